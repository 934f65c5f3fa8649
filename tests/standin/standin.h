// What the two halves of the stand-in share.
#pragma once

extern "C" int standin_launch();  // counts a kernel; returns success

namespace standin {

int attribute(int which);            // of the device; CUDA's runtime and driver number them alike
bool is_block(const void* pointer);  // whether it points into memory of the device, or pinned memory

}  // namespace standin
