// The ratio code: `src/codec/ratio.rs`, bit for bit.
#pragma once
#include "float.cuh"

const int OCTAVES = 24;

// The codes of the largest roots: of 9 bits, and of the third moment's 8.
const int TOP = 511, LARGEST_TOP = 255;

const float MOST = 63.0f;
const int ZERO = 64;
const u32 ZERO_RATIO = ZERO << 1, ZERO_ROOT = 0;  // bytes

const float LEAST = 1.0f / 37778931862957161709568.0f;
const float BEYOND = 18446744073709551616.0f;
const float LIMIT = 4611686018427387904.0f;
const float NEGLIGIBLE = 1.0f / 1267650600228229401496703205376.0f;

const u32 ACROSS = 0xC13FA9A9u, ALONG = 0x9E3779B1u;

const int SLACK = 64;

// The ends of a range of roots, or a scale and nothing.
struct alignas(8) Range {
    float low, high;

    __device__ __forceinline__ bool is(const Range& other) const {
        return __float_as_uint(low) == __float_as_uint(other.low) &&
               __float_as_uint(high) == __float_as_uint(other.high);
    }

    // `usable_range`.
    __device__ __forceinline__ void make_usable() {
        bool usable = high >= LEAST && high < BEYOND;
        low = usable ? fminf(fmaxf(low, LEAST), high) : 0.0f;
        high = usable ? high : 0.0f;
    }

    // From the square of its smallest root that is positive to that of its largest: the bits of the one's
    // negative, 0 for none, and the other's.
    __device__ __forceinline__ void reach(u32 least, u32 largest) {
        low = least == 0 ? __uint_as_float(0x7F800000u) : __fsqrt_rn(__uint_as_float(0u - least));
        high = __fsqrt_rn(__uint_as_float(largest));
    }

    // The smallest range that has both and, if it is one of state, is usable.
    __device__ __forceinline__ void join(Range old) {
        old.make_usable();
        if (!(old.high > 0.0f)) return;
        low = __float_as_int(low) + SLACK < __float_as_int(old.low) ? low : old.low;
        high = fmaxf(high, old.high);
    }

    // `range`, of the smallest root and the largest.
    __device__ __forceinline__ void cut() {
        int least = max(__float_as_int(high) - (OCTAVES << 23), 0);
        low = high == 0.0f ? 0.0f : fmaxf(low, __int_as_float(least));
    }
};

__device__ __forceinline__ float usable_ratio(float scale) {
    return scale > 0.0f && is_finite(scale) ? fminf(scale, LIMIT) : 0.0f;
}

// `scale`, but for what is joined.
__device__ __forceinline__ float ratio_scale(float largest) {
    return largest < NEGLIGIBLE ? 0.0f : fminf(largest, LIMIT);
}

// Floats from here to 2^24 are the integers, with their lower bits as they are. Small integers become
// floats through them, and floats small integers: a multiprocessor does few conversions at a time.
const float INTEGERS = 8388608.0f;

// An integer below 2^23, `INTEGERS` larger.
__device__ __forceinline__ float shifted(u32 i) {
    return __uint_as_float(__float_as_uint(INTEGERS) | i);
}

// `Grid`, of codes up to the last.
template <int LAST>
struct Grid {
    int high;
    float step, gain;

    __device__ __forceinline__ explicit Grid(const Range& range) {
        int low = __float_as_int(range.low);
        high = __float_as_int(range.high);
        const float CELLS = LAST - 1;
        float span = __int2float_rn(high - low);
        step = __fmul_rn(span, 1.0f / CELLS);
        gain = high == low ? 0.0f : __fdiv_rn(CELLS * 65536.0f, span);
    }

    // The root so many codes below the largest.
    __device__ __forceinline__ float below(float down) const {
        return __int_as_float(high - __float2int_rn(__fmul_rn(down, step)));
    }

    __device__ __forceinline__ float decode(u32 code) const {
        float root = below(__fsub_rn(INTEGERS + LAST, shifted(code)));
        return code == 0 ? 0.0f : root;
    }

    // The inverse of what a root's code decodes to takes its place. No root is above the range.
    __device__ __forceinline__ u32 encode(float& root, u32 chance) const {
        float bits = __int2float_rn(high - __float_as_int(root));
        int down = __float2int_rn(__fmul_rn(bits, gain));
        down = min((down + (int)chance) >> 16, LAST - 1);
        bool zero = root == 0.0f;
        root = zero ? 0.0f : __frcp_rn(below(__fsub_rn(shifted((u32)down), INTEGERS)));
        return zero ? 0u : (u32)(LAST - down);
    }
};

// `Ratios`.
struct Ratios {
    float cell, gain;

    __device__ __forceinline__ explicit Ratios(float scale) {
        cell = __fmul_rn(scale, 1.0f / MOST);
        gain = scale < NEGLIGIBLE ? 0.0f : __fdiv_rn(MOST, scale);
    }

    // Of the byte of a first moment.
    __device__ __forceinline__ float decode(u32 first) const {
        return __fmul_rn(__fsub_rn(shifted(first >> 1), INTEGERS + ZERO), cell);
    }

    // The nearest code, and what it loses in the place of the ratio.
    __device__ __forceinline__ u32 encode(float& ratio) const {
        float cells = fmaxf(fminf(__fmul_rn(ratio, gain), MOST), -MOST);
        float code = __fadd_rn(cells, INTEGERS + ZERO);  // which rounds it to an integer
        ratio = __fmaf_rn(-__fsub_rn(code, INTEGERS + ZERO), cell, ratio);
        return __float_as_uint(code) & 0xFFu;
    }
};

__device__ __forceinline__ float inverse(float root) {
    return root > 0.0f ? __frcp_rn(root) : 0.0f;
}

__device__ __forceinline__ u32 mix(u32 x) {
    x = (x ^ x >> 16) * 0x7FEB352Du;
    x = (x ^ x >> 15) * 0x846CA68Bu;
    return x ^ x >> 16;
}

// `key`.
__device__ __forceinline__ u32 key_of(u64 block) {
    return mix((u32)block ^ mix((u32)(block >> 32)));
}

__device__ __forceinline__ u32 noise(u32 key, u32 i) {
    return key + i * ACROSS;
}
