// The dynamic 8-bit code: `src/codec/dynamic.rs` and `block.rs`, bit for bit, by other means. Values
// are looked up, in shared memory that each thread block fills when it starts; and because no two
// thresholds have the same exponent, a table over exponents finds the level by one addition.
#pragma once
#include "float.cuh"

const u32 WARP = 0xFFFFFFFFu;
const int BLOCK = 256;

// One of the two maps.
struct Map {
    float value[256];  // of each code
    // Indexed by the exponent of |x|, from that of 2^-31 to that of 1: what to add to the bits of |x|
    // so that the exponent's place holds the level.
    u32 to_level[32];
    float gain[9];  // by level
    float least;    // the first threshold: from here on the level is not 0
};

constexpr double pow10(int decade) {
    const double powers[7] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0};
    return powers[decade];
}

constexpr double cell(int decade, int j, int cells) {
    return pow10(decade) * (0.1 + 0.9 * (j + 0.5) / cells);
}

// The bits of a positive normal number below 2.
constexpr u32 bits_of(float x) {
    u32 exponent = 127;
    for (; x < 1.0f; x *= 2.0f) exponent--;
    return exponent << 23 | (u32)((x - 1.0f) * 8388608.0f);
}

const u32 FIRST_EXPONENT = 127 - 31;

// `Map::value` of dynamic.rs. The product and the sum are exact in f64: rounded once, as by `fma`.
constexpr float value_of(int k, int first_exponent) {
    int exponent = 0;
    while (k >> exponent > 1) exponent++;
    int decade = exponent - first_exponent;
    if (k == 0 || decade < 0) return 0.0f;
    if (decade == 7) return 1.0f;
    int cells = 1 << exponent;
    float slope = (float)(pow10(decade) * 0.45 / cells), offset = (float)(pow10(decade) * 0.1);
    return (float)((2 * (k - cells) + 1) * (double)slope + (double)offset);
}

// `map` of dynamic.rs, in the same order of operations, and what follows from it.
constexpr Map make_map(bool is_signed) {
    Map map = {};
    int first_exponent = is_signed ? 0 : 1;
    for (int code = 0; code < 256; code++) {
        int k = is_signed ? code - 127 : code + 1;
        map.value[code] = k < 0 ? -value_of(-k, first_exponent) : value_of(k, first_exponent);
    }
    float thresholds[8] = {};
    double below = 0.0;
    for (int level = 1; level <= 7; level++) {
        int decade = level - 1, cells = 1 << (decade + first_exponent);
        thresholds[decade] = (float)((below + cell(decade, 0, cells)) / 2.0);
        map.gain[level] = (float)(cells / (0.9 * pow10(decade)));
        below = cell(decade, cells - 1, cells);
    }
    thresholds[7] = (float)((below + 1.0) / 2.0);
    map.least = thresholds[0];
    u32 level = 0;
    for (u32 i = 0; i < 32; i++) {
        u32 exponent = FIRST_EXPONENT + i;
        map.to_level[i] = (level - exponent) << 23;
        if (level < 8 && bits_of(thresholds[level]) >> 23 == exponent) {
            level++;
            map.to_level[i] = (level << 23) - bits_of(thresholds[level - 1]);
        }
    }
    return map;
}

__device__ const Map MAPS[2] = {make_map(true), make_map(false)};
constexpr float LEAST_UNSIGNED = make_map(false).least;

// Copies of the maps in shared memory; banks do not conflict but for different codes.
struct Tables {
    Map of_signed, of_unsigned;

    // By all threads of the block, before the first use.
    __device__ __forceinline__ void fill() {
        const u32* from = (const u32*)MAPS;
        u32* to = (u32*)this;
        for (int i = threadIdx.x; i < sizeof(Tables) / 4; i += blockDim.x) to[i] = from[i];
        __syncthreads();
    }

    // `Map::nearest`, less 1, for 2^-31 <= x < 2. Levels of a signed map have half the cells.
    static __device__ __forceinline__ u32 nearest(const Map& map, float x, int half) {
        u32 bits = __float_as_uint(x);
        u32 level = (bits + map.to_level[(bits >> 23) - FIRST_EXPONENT]) >> 23;
        // `Map::base`; for levels 0 and 8, which have no gain, this gives no cell either
        float base = __uint_as_float((level << 23) + __float_as_uint(1.0f / -9.0f) - (half << 23));
        u32 last = (1u << level >> half) - 1;
        return last + min(__float2uint_rz(__fmaf_rn(x, map.gain[level], base)), last);
    }

    __device__ __forceinline__ u32 encode_signed(float x) const {
        int k = (int)nearest(of_signed, fmaxf(fabsf(x), TINY), 1) + 1;
        return (u32)(x < 0.0f ? max(127 - k, 0) : 127 + k);
    }

    // A positive second moment never takes the code of zero.
    __device__ __forceinline__ u32 encode_second_moment(float x, bool positive) const {
        return nearest(of_unsigned, fmaxf(x, positive ? LEAST_UNSIGNED : TINY), 0);
    }

    static constexpr float TINY = 1.0f / 2147483648.0f;
};

__device__ __forceinline__ float usable_scale(float scale) {
    return is_finite(scale) ? scale : 0.0f;
}

struct Normalizer {
    float power, reciprocal;

    __device__ __forceinline__ explicit Normalizer(float scale) {
        const float far = 1208925819614629174706176.0f, near = 1.0f / 1208925819614629174706176.0f;
        power = scale < near ? far : scale > far ? near : 1.0f;
        reciprocal = scale == 0.0f ? 0.0f : __fdiv_rn(1.0f, __fmul_rn(scale, power));
    }

    __device__ __forceinline__ float apply(float x) const {
        return __fmul_rn(__fmul_rn(x, power), reciprocal);
    }
};

__device__ __forceinline__ u32 warp_max(u32 x) {
#if __CUDA_ARCH__ >= 800
    return __reduce_max_sync(WARP, x);
#else
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        x = max(x, __shfl_xor_sync(WARP, x, distance));
    }
    return x;
#endif
}

// The largest magnitude that the warp has among numbers that are not NaN. As bits, numbers that are not
// negative have their order.
template <int N>
__device__ __forceinline__ float warp_max(const float (&x)[N]) {
    float max = 0.0f;
#pragma unroll
    for (int i = 0; i < N; i++) max = fmaxf(max, fabsf(x[i]));
    return __uint_as_float(warp_max(__float_as_uint(max)));
}
