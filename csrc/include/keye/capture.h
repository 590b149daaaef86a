#pragma once

namespace keye {

// A number of its own for each capture of a CUDA graph; 0 if the stream captures nothing.
unsigned long long capture_id(void* stream);

}  // namespace keye
