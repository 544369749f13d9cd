// What the bindings share; see bindings.cpp.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "api/element_type.h"

namespace py = pybind11;

using address = std::uintptr_t;
using release_gil = py::call_guard<py::gil_scoped_release>;

template <class T, class Number>
T* pointer(Number value) {
    return reinterpret_cast<T*>(static_cast<address>(value));
}

// By its name in PyTorch.
inline simctg::ElementType element_type(const std::string& dtype) {
    if (dtype == "float32") return simctg::ElementType::float32;
    if (dtype == "bfloat16") return simctg::ElementType::bfloat16;
    if (dtype == "float16") return simctg::ElementType::float16;
    throw std::invalid_argument("dtype is " + dtype + ", must be float32, bfloat16 or float16");
}

void bind_crf(py::module_& m);
void bind_decoding(py::module_& m);
void bind_losses(py::module_& m);
