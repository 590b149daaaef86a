#pragma once

#include <string>

namespace keye {

// Bytes of shared memory of a block, which the compiler's output does not tell. `argument`: the
// number among the template arguments of the kernel. 0 if it uses none.
int shared_bytes(const std::string& kernel, int argument);

}  // namespace keye
