// The kernels as they stand, and a table of their instantiations by name expression.
#pragma once

#include "cuda_on_cpu.h"
// After what it needs.
#include "reduce.cu"

using Kernel = void (*)(ReduceArguments);

// One of these for each instantiation, at namespace scope.
struct Registration {
    Registration(const char* name_expression, Kernel kernel);
};

// Runs all threads of a grid, one after the other: from the first, or backwards. False where there is no such kernel.
bool launch(const char* name_expression, const ReduceArguments& arguments, unsigned int blocks, unsigned int threads,
            bool backwards);
