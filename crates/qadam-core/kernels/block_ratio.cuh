// A warp's block in the ratio code: how its moments come from memory and go back.
#pragma once
#include "block.cuh"

// The scales of a block, or the one of all.
__device__ __forceinline__ float* scale_of(const Moment& moment, const Place& place) {
    return global<float>(moment.scale) + (moment.is_told() ? 0 : place.start / BLOCK);
}

__device__ __forceinline__ Range* range_of(const Moment& moment, const Place& place) {
    return global<Range>(moment.scale) + (moment.is_told() ? 0 : place.start / BLOCK);
}

// The roots of a third moment.
__device__ __forceinline__ void load_largest_roots(float (&roots)[LANE], const Place& place) {
    Moment from = place.desk->max_v;
    Codes codes;
    codes.load(from.address, place, ZERO_ROOT);
    Range range = *range_of(from, place);
    range.make_usable();
    Grid<LARGEST_TOP> grid(range);
#pragma unroll
    for (int i = 0; i < LANE; i++) roots[i] = grid.decode(codes.at(i));
}

__device__ __forceinline__ void load_ratios(Block& block, bool amsgrad, const Place& place) {
    Moment from_m = place.desk->m, from_v = place.desk->v;
    Codes first, second;
    first.load(from_m.address, place, ZERO_RATIO);
    second.load(from_v.address, place, ZERO_ROOT);
    Range range = *range_of(from_v, place);
    range.make_usable();
    Grid<TOP> grid(range);
    Ratios ratios(usable_ratio(*scale_of(from_m, place)));
#pragma unroll
    for (int i = 0; i < LANE; i++) {
        float root = grid.decode(second.at(i) << 1 | (first.at(i) & 1u));
        block.m[i] = root;
        block.v[i] = __fmul_rn(root, root);
    }
    if (amsgrad) load_largest_roots(block.m, place);
#pragma unroll
    for (int i = 0; i < LANE; i++) {
        block.m[i] = __fmul_rn(ratios.decode(first.at(i)), block.m[i]);
    }
}

// A block's third moments.
__device__ __forceinline__ void load_largest(
    float (&v)[LANE], bool is_8bit, bool is_ratio, const Place& place, const Tables& tables
) {
    if (!is_ratio) {
        load_second_moment(v, place.desk->max_v, is_8bit, place, tables);
        return;
    }
    load_largest_roots(v, place);
#pragma unroll
    for (int i = 0; i < LANE; i++) v[i] = __fmul_rn(v[i], v[i]);
}

// Encodes the roots of second moments, finite ones, for their range or a new one, and says whether that
// is another than it was where elements are kept. The inverses of what the codes stand for take the
// moments' place. The lowest bits of codes that are longer than a byte go to `low`, one an element.
template <int LAST>
__device__ __forceinline__ bool encode_roots(
    float (&v)[LANE], const Moment& to, const Place& place, bool keep, Codes& codes, u32& low
) {
    Range range = to.told;
    if (!to.is_told()) {
        u32 least = 0, largest = 0;
#pragma unroll
        for (int i = 0; i < LANE; i++) {
            least = max(least, 0u - __float_as_uint(v[i]));
            largest = max(largest, __float_as_uint(v[i]));
        }
        range.reach(warp_max(least), warp_max(largest));
        if (keep) range.join(*range_of(to, place));
        range.cut();
    }
    bool moves = keep && !range.is(*range_of(to, place));
    Grid<LAST> grid(range);
    u32 first = noise(key_of(place.start / BLOCK), place.first()) + place.desk->c.dither;
    const int BITS = LAST / 256;
#pragma unroll
    for (int i = 0; i < LANE; i++) {
        u32 chance = noise(first, place.beyond(i)) >> 16;
        v[i] = __fsqrt_rn(v[i]);
        u32 code = grid.encode(v[i], chance);
        codes.set(i, code >> BITS);
        if (BITS > 0) low = i == 0 ? code & 1u : low | (code & 1u) << i;
    }
    // Or the compiler would look through `low` and keep every code until then, in a register each.
    if (BITS > 0) asm("" : "+r"(low));
    __syncwarp();  // every lane has read the old range
    if (!to.is_told() && place.lane == 0) *range_of(to, place) = range;
    return moves;
}

// Encodes the ratios in `m`, and moves parameters by what they lose to their roots, whose inverses are in
// `v`; not those that are kept.
template <bool KEEP>
__device__ __forceinline__ void encode_ratios(
    Block& block, float scale, u32 low, u32 kept, const Coefficients& c, Codes& codes
) {
    Ratios ratios(scale);
#pragma unroll
    for (int i = 0; i < LANE; i++) {
        float lost = block.m[i];
        u32 code = ratios.encode(lost);
        codes.set(i, code << 1 | (low >> i & 1u));
        if (KEEP && kept >> i & 1u) continue;
        block.p[i] = carried(block.p[i], lost, block.v[i], c);
    }
}

// Stores the moments of a block, and moves its parameters by what rounding takes from the first ones.
// With AMSGrad, `v` are the third moments, and the second are on the stage.
__device__ __forceinline__ void store_ratios(
    Block& block, bool amsgrad, const Place& place, bool keep
) {
    Desk& desk = *place.desk;
    Codes first, second, third;
    u32 low;
    bool moves = false;
    if (amsgrad) {
        // Moments change places with inverses, which are used last.
        moves = encode_roots<LARGEST_TOP>(block.v, desk.max_v, place, keep, third, low);
        float v[LANE];
        take(v, desk.stage, place);
        put(desk.stage, block.v, place);
#pragma unroll
        for (int i = 0; i < LANE; i++) block.v[i] = v[i];
    }
    moves |= encode_roots<TOP>(block.v, desk.v, place, keep, second, low);
    if (amsgrad) take(block.v, desk.stage, place);
#pragma unroll
    for (int i = 0; i < LANE; i++) block.m[i] = __fmul_rn(block.m[i], block.v[i]);
    u32 kept = keep ? desk.kept[place.lane] : 0;
    float* scale_at = scale_of(desk.m, place);
    float scale = desk.m.told.high;
    if (!desk.m.is_told()) {
        if (keep) {
            scale = usable_ratio(*scale_at);
#pragma unroll
            for (int i = 0; i < LANE; i++) {
                if (!(kept >> i & 1u)) scale = fmaxf(scale, fabsf(block.m[i]));
            }
            scale = __uint_as_float(warp_max(__float_as_uint(scale)));
        } else {
            scale = warp_max(block.m);
        }
        scale = ratio_scale(scale);
    }
    bool stays = keep && !moves && __float_as_uint(scale) == __float_as_uint(*scale_at);
    if (keep) {
        encode_ratios<true>(block, scale, low, kept, desk.c, first);
    } else {
        encode_ratios<false>(block, scale, low, 0, desk.c, first);
    }
    if (stays) {
        first.keep(kept, desk.m.address, place);
        second.keep(kept, desk.v.address, place);
        if (amsgrad) third.keep(kept, desk.max_v.address, place);
    }
    first.store(desk.m.address, place);
    second.store(desk.v.address, place);
    if (amsgrad) third.store(desk.max_v.address, place);
    __syncwarp();  // every lane has read the old scale
    if (!desk.m.is_told() && place.lane == 0) *scale_at = scale;
}
