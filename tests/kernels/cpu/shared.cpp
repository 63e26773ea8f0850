// The table of kernels, and their launches: part of the launcher, and with the kernels a library for the same process.
#include "launcher.h"

#include <cstdint>
#include <map>
#include <string>

namespace {

std::map<std::string, Kernel>& kernels() {
    static std::map<std::string, Kernel> table;
    return table;
}

}  // namespace

Registration::Registration(const char* name_expression, Kernel kernel) { kernels()[name_expression] = kernel; }

bool launch(const char* name_expression, const ReduceArguments& arguments, unsigned int blocks, unsigned int threads,
            bool backwards) {
    const auto found = kernels().find(name_expression);
    if (found == kernels().end()) return false;
    gridDim.x = blocks;
    blockDim.x = threads;
    const std::uint64_t all = std::uint64_t{blocks} * threads;
    for (std::uint64_t i = 0; i < all; ++i) {
        const std::uint64_t thread = backwards ? all - 1 - i : i;
        blockIdx.x = static_cast<unsigned int>(thread / threads);
        threadIdx.x = static_cast<unsigned int>(thread % threads);
        found->second(arguments);
    }
    return true;
}

// Returns 0, or 1 where there is no such kernel. May be called by several threads at a time.
extern "C" int launch(const char* name_expression, const ReduceArguments* arguments, unsigned int blocks,
                      unsigned int threads) {
    return launch(name_expression, *arguments, blocks, threads, false) ? 0 : 1;
}
