// Adds the functions of crf.h to the module.
#pragma once

#include <pybind11/pybind11.h>

void bind_crf(pybind11::module_& m);
