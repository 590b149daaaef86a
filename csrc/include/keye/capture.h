#pragma once

namespace keye {

// A unique number of the CUDA graph capture that `stream` is in; 0 if it is in none.
unsigned long long capture_id(void* stream);

}  // namespace keye
