// Element types: loads widen to f32 exactly, stores round to nearest even; `src/dtype.rs` is the
// definition. NaN payloads are carried by hand, because the hardware's conversions drop them and a
// skipped element must keep its bits.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

__device__ __forceinline__ bool is_nan(float x) { return x != x; }
__device__ __forceinline__ bool is_finite(float x) {
    return fabsf(x) < __uint_as_float(0x7F800000u);
}

struct F32 {
    typedef u32 Bits;
    static __device__ __forceinline__ float widen(u32 bits) { return __uint_as_float(bits); }
    static __device__ __forceinline__ u32 round(float x) { return __float_as_uint(x); }
};

struct BF16 {
    typedef u16 Bits;
    static __device__ __forceinline__ float widen(u16 bits) {
        return __uint_as_float((u32)bits << 16);
    }
    static __device__ __forceinline__ u16 round(float x) {
        u32 bits = __float_as_uint(x);
        u32 rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
        return (u16)(is_nan(x) ? bits >> 16 | 0x40u : rounded);
    }
};

struct F16 {
    typedef u16 Bits;
    static __device__ __forceinline__ float widen(u16 bits) {
        float x;
        asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
        u32 nan = (u32)(bits & 0x8000u) << 16 | 0x7FC00000u | (u32)(bits & 0x3FFu) << 13;
        return (bits & 0x7FFFu) > 0x7C00u ? __uint_as_float(nan) : x;
    }
    static __device__ __forceinline__ u16 round(float x) {
        u16 rounded;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded) : "f"(x));
        u32 bits = __float_as_uint(x);
        u32 nan = (bits >> 16 & 0x8000u) | 0x7E00u | (bits >> 13 & 0x3FFu);
        return is_nan(x) ? (u16)nan : rounded;
    }
};
