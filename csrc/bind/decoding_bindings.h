// Bindings of what a decoding step computes on the CPU; see bindings.cpp.
#pragma once

#include <pybind11/pybind11.h>

void bind_decoding(pybind11::module_& m);
