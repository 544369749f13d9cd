// What the bindings share; see bindings.cpp.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace py = pybind11;

using address = std::uintptr_t;
using release_gil = py::call_guard<py::gil_scoped_release>;

template <class T, class Number>
T* pointer(Number value) {
    return reinterpret_cast<T*>(static_cast<address>(value));
}

void bind_crf(py::module_& m);
void bind_decoding(py::module_& m);
void bind_losses(py::module_& m);
