// Parts of the module bedplate._native, each in a file of its own.
#pragma once

#include <nanobind/nanobind.h>

namespace bedplate {

void bind_packing(nanobind::module_& m);
void bind_sampling(nanobind::module_& m);

}  // namespace bedplate
