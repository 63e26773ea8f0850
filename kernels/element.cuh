// Element types, and how they are computed with.
//
// The same text is compiled by NVRTC, which has no standard headers, and by a C++ compiler of the host, for which a test
// defines what CUDA builds in. Only the conversions of the half types differ: a GPU has instructions for them.
#pragma once

struct float16 { unsigned short bits; };
struct bfloat16 { unsigned short bits; };

// One value seen as another type of the same size.
template <class To, class From>
__device__ __forceinline__ To bit_cast(From value) {
    static_assert(sizeof(To) == sizeof(From), "the sizes must agree");
    union { From from; To to; } cast = {value};
    return cast.to;
}

// Widens to float; exact.
__device__ __forceinline__ float widen(float16 value) {
#ifdef __CUDA_ARCH__
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
    return wide;
#else
    const unsigned int sign = (value.bits & 0x8000u) << 16;
    const unsigned int exponent = (value.bits >> 10) & 0x1fu;
    const unsigned int mantissa = value.bits & 0x3ffu;
    if (exponent == 0) {  // zero and subnormals, in units of 2^-24
        const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
        return bit_cast<float>(bit_cast<unsigned int>(magnitude) | sign);
    }
    const unsigned int wide_exponent = exponent == 0x1fu ? 0xffu : exponent + (127 - 15);
    return bit_cast<float>(sign | wide_exponent << 23 | mantissa << 13);
#endif
}

__device__ __forceinline__ float widen(bfloat16 value) {
    return bit_cast<float>(static_cast<unsigned int>(value.bits) << 16);
}

// Rounds to nearest, ties to even.
__device__ __forceinline__ float16 narrow_to_float16(float value) {
    float16 narrow;
#ifdef __CUDA_ARCH__
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
#else
    const unsigned int all = bit_cast<unsigned int>(value);
    const unsigned int sign = (all >> 16) & 0x8000u;
    const unsigned int magnitude = all & 0x7fffffffu;
    unsigned int half;
    if (magnitude > 0x7f800000u) {  // NaN
        half = 0x7e00u;
    } else if (magnitude >= 0x477ff000u) {  // 65520, half way to what would be the next number, and above
        half = 0x7c00u;
    } else if (magnitude >= 0x38800000u) {  // 2^-14, the smallest normal number, and above
        half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    } else if (magnitude >= 0x33000000u) {  // subnormals, in units of 2^-24
        const unsigned int shift = 126u - (magnitude >> 23);
        const unsigned int mantissa = (magnitude & 0x7fffffu) | 0x800000u;
        const unsigned int rest = mantissa & ((1u << shift) - 1u);
        const unsigned int tie = 1u << (shift - 1u);
        half = mantissa >> shift;
        half += rest > tie || (rest == tie && (half & 1u)) ? 1u : 0u;
    } else {
        half = 0u;
    }
    narrow.bits = static_cast<unsigned short>(sign | half);
#endif
    return narrow;
}

__device__ __forceinline__ bfloat16 narrow_to_bfloat16(float value) {
    bfloat16 narrow;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
#else
    const unsigned int all = bit_cast<unsigned int>(value);
    const bool is_nan = (all & 0x7fffffffu) > 0x7f800000u;
    const unsigned int rounded = is_nan ? all | 0x400000u : all + 0x7fffu + ((all >> 16) & 1u);
    narrow.bits = static_cast<unsigned short>(rounded >> 16);
#endif
    return narrow;
}

// What an element is accumulated in.
//
// Integers wrap at their own width whatever the accumulator's: the low bits of sums and products do not depend on the high
// ones. `wrapped` gives an accumulator as it would be with the element's own width; a half type is only rounded at the end.
template <class T>
struct Element {
    using Accumulator = T;
    static __device__ __forceinline__ T wrapped(T value) { return value; }
    static __device__ __forceinline__ T widened(T value) { return value; }
    static __device__ __forceinline__ T narrowed(T value) { return value; }
};
template <>
struct Element<float16> {
    using Accumulator = float;
    static __device__ __forceinline__ float wrapped(float value) { return value; }
    static __device__ __forceinline__ float widened(float16 value) { return widen(value); }
    static __device__ __forceinline__ float16 narrowed(float value) { return narrow_to_float16(value); }
};
template <>
struct Element<bfloat16> {
    using Accumulator = float;
    static __device__ __forceinline__ float wrapped(float value) { return value; }
    static __device__ __forceinline__ float widened(bfloat16 value) { return widen(value); }
    static __device__ __forceinline__ bfloat16 narrowed(float value) { return narrow_to_bfloat16(value); }
};
template <>
struct Element<signed char> {
    using Accumulator = int;
    static __device__ __forceinline__ int wrapped(int value) { return static_cast<signed char>(value); }
    static __device__ __forceinline__ int widened(signed char value) { return value; }
    static __device__ __forceinline__ signed char narrowed(int value) { return static_cast<signed char>(value); }
};
template <>
struct Element<unsigned char> {
    using Accumulator = unsigned int;
    static __device__ __forceinline__ unsigned int wrapped(unsigned int value) { return static_cast<unsigned char>(value); }
    static __device__ __forceinline__ unsigned int widened(unsigned char value) { return value; }
    static __device__ __forceinline__ unsigned char narrowed(unsigned int value) { return static_cast<unsigned char>(value); }
};
