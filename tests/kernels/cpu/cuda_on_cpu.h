// What CUDA builds in and the kernels use, for a C++ compiler of the host.
#pragma once

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)

// A load or store of one is the 16-byte access of a GPU; the sanitizer reports those whose address is no multiple of 16.
struct alignas(16) uint4 {
    unsigned int x, y, z, w;
};

struct Index {
    unsigned int x;
};
// The threads of a launch run one after the other.
inline thread_local Index blockIdx, threadIdx, gridDim, blockDim;
