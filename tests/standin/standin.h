// What the two halves of the stand-in share.
#pragma once

#include <cuda_runtime_api.h>

extern "C" int standin_launch();                        // counts a kernel; returns success
extern "C" int standin_launch_on(cudaStream_t stream);   // and where it runs
extern "C" int standin_collective(cudaStream_t stream);  // counts a sum or an exchange of several processes

namespace standin {

int attribute(int which);            // of the device; CUDA's runtime and driver number them alike
bool is_block(const void* pointer);  // whether it points into memory of the device, or pinned memory

}  // namespace standin
