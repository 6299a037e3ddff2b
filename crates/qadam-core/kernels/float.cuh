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

__device__ __forceinline__ bool is_finite(double x) {
    return fabs(x) < __longlong_as_double(0x7FF0000000000000ll);
}

// `widen` and `round` are right for every bit pattern, their `_number` forms for all but NaNs; widened,
// those are NaNs still.
struct F32 {
    typedef u32 Bits;
    static __device__ __forceinline__ float widen(u32 bits) { return __uint_as_float(bits); }
    static __device__ __forceinline__ u32 round(float x) { return __float_as_uint(x); }
    static __device__ __forceinline__ float widen_number(u32 bits) { return widen(bits); }
    static __device__ __forceinline__ u32 round_number(float x) { return round(x); }
};

struct BF16 {
    typedef u16 Bits;
    static __device__ __forceinline__ float widen(u16 bits) {
        return __uint_as_float((u32)bits << 16);
    }
    static __device__ __forceinline__ float widen_number(u16 bits) { return widen(bits); }
    static __device__ __forceinline__ u16 round_number(float x) {
        u32 bits = __float_as_uint(x);
        return (u16)((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
    }
    static __device__ __forceinline__ u16 round(float x) {
        return is_nan(x) ? (u16)(__float_as_uint(x) >> 16 | 0x40u) : round_number(x);
    }
};

struct F16 {
    typedef u16 Bits;
    static __device__ __forceinline__ float widen_number(u16 bits) {
        float x;
        asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
        return x;
    }
    static __device__ __forceinline__ float widen(u16 bits) {
        u32 nan = (u32)(bits & 0x8000u) << 16 | 0x7FC00000u | (u32)(bits & 0x3FFu) << 13;
        return (bits & 0x7FFFu) > 0x7C00u ? __uint_as_float(nan) : widen_number(bits);
    }
    static __device__ __forceinline__ u16 round_number(float x) {
        u16 rounded;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded) : "f"(x));
        return rounded;
    }
    static __device__ __forceinline__ u16 round(float x) {
        u32 bits = __float_as_uint(x);
        u32 nan = (bits >> 16 & 0x8000u) | 0x7E00u | (bits >> 13 & 0x3FFu);
        return is_nan(x) ? (u16)nan : round_number(x);
    }
};

// Many at once: NaNs are rare, and looked after where there is one.
template <typename T, int N>
__device__ __forceinline__ void widen(float (&to)[N], const typename T::Bits (&from)[N]) {
    bool nan = false;
#pragma unroll
    for (int i = 0; i < N; i++) {
        to[i] = T::widen_number(from[i]);
        nan |= is_nan(to[i]);
    }
    if (nan) {
#pragma unroll
        for (int i = 0; i < N; i++) to[i] = T::widen(from[i]);
    }
}

template <typename T, int N>
__device__ __forceinline__ void round(typename T::Bits (&to)[N], const float (&from)[N]) {
    bool nan = false;
#pragma unroll
    for (int i = 0; i < N; i++) {
        to[i] = T::round_number(from[i]);
        nan |= is_nan(from[i]);
    }
    if (nan) {
#pragma unroll
        for (int i = 0; i < N; i++) to[i] = T::round(from[i]);
    }
}
