// Reduction operators: one functor each, named as in enum ReduceOp; and what a rank's weight does to its data.
//
// `combine` joins two accumulators; `finish` makes the result of the complete accumulator.
#pragma once

#include "element.cuh"

// ---- arithmetic of accumulators ----

template <class A>
__device__ __forceinline__ A sum(A a, A b) { return a + b; }
template <class A>
__device__ __forceinline__ A product(A a, A b) { return a * b; }
template <class A>
__device__ __forceinline__ A quotient(A a, A b) { return a / b; }
// As numpy.minimum and numpy.maximum: NaN if either is NaN. Of +0 and -0, which are equal, the second.
template <class A>
__device__ __forceinline__ A minimum(A a, A b) { return a < b || a != a ? a : b; }
template <class A>
__device__ __forceinline__ A maximum(A a, A b) { return a > b || a != a ? a : b; }

// Signed overflow is undefined in C++; the unsigned twin wraps.
__device__ __forceinline__ int sum(int a, int b) {
    return static_cast<int>(static_cast<unsigned int>(a) + static_cast<unsigned int>(b));
}
__device__ __forceinline__ int product(int a, int b) {
    return static_cast<int>(static_cast<unsigned int>(a) * static_cast<unsigned int>(b));
}
__device__ __forceinline__ long long sum(long long a, long long b) {
    return static_cast<long long>(static_cast<unsigned long long>(a) + static_cast<unsigned long long>(b));
}
__device__ __forceinline__ long long product(long long a, long long b) {
    return static_cast<long long>(static_cast<unsigned long long>(a) * static_cast<unsigned long long>(b));
}

#ifdef __CUDA_ARCH__
// CuPy compiles with -ftz=true, under which C++'s operators on float take subnormal numbers for zero. These instructions
// do not: without .ftz they mean what they say, whatever the options.
__device__ __forceinline__ float sum(float a, float b) {
    float result;
    asm("add.rn.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}
__device__ __forceinline__ float product(float a, float b) {
    float result;
    asm("mul.rn.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}
__device__ __forceinline__ float quotient(float a, float b) {
    float result;
    asm("div.rn.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}
__device__ __forceinline__ float minimum(float a, float b) {
    float result;
    asm("{\n"
        ".reg .pred is_nan, first;\n"
        "setp.nan.f32 is_nan, %1, %1;\n"
        "setp.lt.or.f32 first, %1, %2, is_nan;\n"
        "selp.f32 %0, %1, %2, first;\n"
        "}" : "=f"(result) : "f"(a), "f"(b));
    return result;
}
__device__ __forceinline__ float maximum(float a, float b) {
    float result;
    asm("{\n"
        ".reg .pred is_nan, first;\n"
        "setp.nan.f32 is_nan, %1, %1;\n"
        "setp.gt.or.f32 first, %1, %2, is_nan;\n"
        "selp.f32 %0, %1, %2, first;\n"
        "}" : "=f"(result) : "f"(a), "f"(b));
    return result;
}
#endif

// ---- operators ----

// What a complete accumulator is scaled by.
struct Scaling {
    unsigned int divisor;       // of an average
    unsigned long long weight;  // bits of an accumulator, from the lowest on
};

// An operator whose complete accumulator is the result.
struct Plain {
    template <class T>
    static __device__ __forceinline__ T finish(typename Element<T>::Accumulator value, const Scaling&) {
        return Element<T>::narrowed(value);
    }
};

struct Sum : Plain {
    static constexpr bool kScales = false;
    template <class A>
    static __device__ __forceinline__ A combine(A a, A b) { return sum(a, b); }
};

struct Prod : Plain {
    static constexpr bool kScales = false;
    template <class A>
    static __device__ __forceinline__ A combine(A a, A b) { return product(a, b); }
};

struct Min : Plain {
    static constexpr bool kScales = false;
    template <class A>
    static __device__ __forceinline__ A combine(A a, A b) { return minimum(a, b); }
};

struct Max : Plain {
    static constexpr bool kScales = false;
    template <class A>
    static __device__ __forceinline__ A combine(A a, A b) { return maximum(a, b); }
};

// Divides the sum in the accumulator; integers, wrapped to their width before, truncate toward zero as NCCL's do.
struct Avg : Sum {
    static constexpr bool kScales = true;
    template <class T>
    static __device__ __forceinline__ T finish(typename Element<T>::Accumulator value, const Scaling& scaling) {
        using Accumulator = typename Element<T>::Accumulator;
        return Element<T>::narrowed(quotient(Element<T>::wrapped(value), static_cast<Accumulator>(scaling.divisor)));
    }
};

template <class A>
__device__ __forceinline__ A weight_of(const Scaling& scaling) { return static_cast<A>(scaling.weight); }
template <>
__device__ __forceinline__ double weight_of<double>(const Scaling& scaling) { return bit_cast<double>(scaling.weight); }
template <>
__device__ __forceinline__ float weight_of<float>(const Scaling& scaling) {
    return bit_cast<float>(static_cast<unsigned int>(scaling.weight));
}

// Of one source: multiplies it by a weight, in the accumulator. Integers wrap.
struct Weigh : Sum {
    static constexpr bool kScales = true;
    template <class T>
    static __device__ __forceinline__ T finish(typename Element<T>::Accumulator value, const Scaling& scaling) {
        return Element<T>::narrowed(product(value, weight_of<typename Element<T>::Accumulator>(scaling)));
    }
};
