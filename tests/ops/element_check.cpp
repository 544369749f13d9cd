// The conversions of csrc/simd/element.h as functions of arrays: `tests/ops/test_element.py` builds it for each instruction
// set and holds it against PyTorch.
#include "simd/element.h"

using namespace simctg;
using namespace simctg::simd;

namespace {

enum Way { whole_arrays, one_by_one, ends_of_rows };

// Beginnings of vectors, of every length.
template <class In, class Out>
void by_masks(const In* in, int64_t count, Out* out) {
    for (int64_t i = 0, lanes = 1; i < count; i += lanes, lanes = lanes % (kLanes - 1) + 1) {
        lanes = smaller(lanes, count - i);
        store(out + i, load(in + i, first_lanes(lanes)), first_lanes(lanes));
    }
}

}  // namespace

extern "C" void widen_all(int type, int way, const void* data, int64_t count, float* out) {
    with_type(static_cast<ElementType>(type), data, [=](const auto* in) {
        if (way == whole_arrays) widen_array(in, count, out);
        else if (way == ends_of_rows) by_masks(in, count, out);
        else for (int64_t i = 0; i < count; ++i) out[i] = widen(in[i]);
    });
}

extern "C" void narrow_all(int type, int way, const float* in, int64_t count, void* data) {
    with_type(static_cast<ElementType>(type), data, [=](auto* out) {
        if (way == whole_arrays) narrow_array(in, count, out);
        else if (way == ends_of_rows) by_masks(in, count, out);
        else for (int64_t i = 0; i < count; ++i) narrow(in[i], out + i);
    });
}
