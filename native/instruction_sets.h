// Which kernels run: the best that this machine has, unless told otherwise.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace bedplate {

// Names of the instruction sets that kernels are compiled for and this machine has, the best first.
std::vector<std::string> instruction_sets();
// Those of decoders made from here on.
const Kernels& current_kernels();
// InvalidError: the machine has no such set.
void use_instruction_set(const std::string& name);

}  // namespace bedplate
