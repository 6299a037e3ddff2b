// What has to be known of a whole tensor before any of it is written: how long its update is, where
// that is limited, and its new scales, where it has one a moment. src/cpu/measure.rs is the definition.
#pragma once
#include "clip.cuh"

// What a lane finds of a chunk, besides sums.
struct Gauge {
    u32 reach[REACH];  // of the new moments
    bool keeps;        // whether elements are kept
};

// Adds the squares of a block's values, eight of which each lane has in its vectors, to the lanes' sums.
__device__ __forceinline__ void add_squares(
    double& sum, const float (&values)[LANE], const Place& place
) {
    const float* stage = (const float*)place.desk->stage;
    put(place.desk->stage, values, place);
    __syncwarp();
#pragma unroll
    for (int i = place.lane; i < BLOCK; i += 32) {
        if (i < place.len) add_square(sum, stage[i]);
    }
    __syncwarp();
}

// The largest magnitude, as bits, of those that are finite, or `reach`.
__device__ __forceinline__ void extend(u32& reach, const float (&moment)[LANE]) {
#pragma unroll
    for (int i = 0; i < LANE; i++) {
        float x = fabsf(moment[i]);
        reach = is_finite(x) ? max(reach, __float_as_uint(x)) : reach;
    }
}

// The same of the negatives of those that are positive.
__device__ __forceinline__ void extend_down(u32& reach, const float (&moment)[LANE]) {
#pragma unroll
    for (int i = 0; i < LANE; i++) {
        float x = moment[i];
        reach = is_finite(x) ? max(reach, 0u - __float_as_uint(x)) : reach;
    }
}

// The same of ratios: first moments to the roots of second moments.
__device__ __forceinline__ void extend_ratios(
    u32& reach, const float (&m)[LANE], const float (&v)[LANE]
) {
#pragma unroll
    for (int i = 0; i < LANE; i++) {
        float root = is_finite(v[i]) ? __fsqrt_rn(v[i]) : 0.0f;
        float ratio = __fmul_rn(is_finite(m[i]) ? m[i] : 0.0f, inverse(root));
        reach = max(reach, __float_as_uint(fabsf(ratio)));
    }
}

// Does to a block what the step will do, and writes nothing.
__device__ __forceinline__ void gauge_block(
    const Tensor& tensor, const Path& param, const Place& place,
    const Coefficients& c, bool is_limited, const Tables& tables, double (&sums)[2], Gauge& gauge
) {
    Desk& desk = *place.desk;
    bool is_8bit = tensor.flags & IS_8BIT, is_ratio = tensor.flags & IS_RATIO;
    bool one_scale = tensor.flags & ONE_SCALE, amsgrad = tensor.flags & IS_AMSGRAD;
    Block block;
    float g[LANE];
    load(g, tensor.grad_dtype, {desk.gradient, param.access, false}, place);
    load(block.p, tensor.param_dtype, param, place);
    if (is_ratio) {
        load_ratios(block, amsgrad, place);
    } else {
        load_moments(block, is_8bit, place, tables);
    }
    u32 kept;
    Outcome outcome = block.average(g, c, desk.factor, place, kept);
    gauge.keeps |= (outcome & KEEPS) != 0;
    if (one_scale) {
        extend(gauge.reach[1], block.v);
        if (is_ratio) extend_down(gauge.reach[3], block.v);
    }
    if (amsgrad) {
        load_largest(g, is_8bit, is_ratio, place, tables);
#pragma unroll
        for (int i = 0; i < LANE; i++) {
            block.v[i] = kept >> i & 1u ? g[i] : maximum(g[i], block.v[i]);
        }
        if (one_scale) {
            extend(gauge.reach[2], block.v);
            if (is_ratio) extend_down(gauge.reach[4], block.v);
        }
    }
    if (one_scale) {
        if (is_ratio) {
            extend_ratios(gauge.reach[0], block.m, block.v);
        } else {
            extend(gauge.reach[0], block.m);
        }
    }
    if (!is_limited) return;
    add_squares(sums[0], block.p, place);
#pragma unroll
    for (int i = 0; i < LANE; i++) {
        g[i] = kept >> i & 1u ? 0.0f : direction(block.m[i], block.v[i], c);
    }
    add_squares(sums[1], g, place);
}

// Adds to what is known of a tensor's new scales.
__device__ __forceinline__ void report(Tally* tally, const Gauge& gauge, int lane) {
#pragma unroll
    for (int i = 0; i < REACH; i++) {
        u32 reach = warp_max(gauge.reach[i]);
        if (lane == 0) atomicMax(&tally->reach[i], reach);
    }
    if (lane == 0 && gauge.keeps) atomicOr(&tally->keeps, 1u);
}

// The new scales of the moments, for which `old` ones are joined where elements are kept. 0 again is what
// was found.
__device__ __forceinline__ void new_scales(Found* found, Tally* tally, const Tensor& tensor) {
    bool keeps = atomicExch(&tally->keeps, 0u) != 0, is_ratio = tensor.flags & IS_RATIO;
    u64 old[3] = {tensor.m_scale, tensor.v_scale, tensor.max_v_scale};
    u32 reach[REACH];
#pragma unroll
    for (int i = 0; i < REACH; i++) reach[i] = atomicExch(&tally->reach[i], 0u);
#pragma unroll
    for (int i = 0; i < 3; i++) {
        bool joins = keeps && old[i] != 0;
        Range scale = {0.0f, __uint_as_float(reach[i])};
        if (!is_ratio) {
            if (joins) scale.high = fmaxf(scale.high, usable_scale(*global<const float>(old[i])));
        } else if (i == 0) {
            if (joins) scale.high = fmaxf(scale.high, usable_ratio(*global<const float>(old[i])));
            scale.high = ratio_scale(scale.high);
        } else {
            scale.reach(reach[2 + i], reach[i]);
            if (joins) scale.join(*global<const Range>(old[i]));
            scale.cut();
        }
        found->scale[i] = scale;
    }
}

__device__ __forceinline__ void measure_chunk(
    const Table* table, const Tensor& tensor, const Grad& grad, const Chunk& chunk,
    const Hyper& hyper, int lane, const Tables& tables, Desk* desk
) {
    u64 t = coming_step(tensor);
    Coefficients c = coefficients(hyper, t);
    if (lane == 0) fill(desk, tensor, grad, cut_factor(hyper, grad), nullptr);
    __syncwarp();
    Path param = {tensor.param, grad.access, true};
    Tally* tally = table->tallies + chunk.tensor;
    bool one_scale = tensor.flags & ONE_SCALE, is_limited = hyper.max_unorm > 0.0;
    Gauge gauge = {};
    auto gauge_fold = [&](double (&sums)[2], u64 start, u32 len) {
        Place place = {start, BLOCK, lane, desk};
#pragma unroll 1
        for (; len > 0; len -= place.len) {
            place.len = (int)min(len, (u32)BLOCK);
            gauge_block(
                tensor, param, place, c, is_limited, tables, sums, gauge
            );
            place.start += BLOCK;
        }
    };
    auto before = [&] {
        if (one_scale) report(tally, gauge, lane);
    };
    double sums[2];
    if (!sum_up(sums, table, tensor, chunk, lane, gauge_fold, before) || lane != 0) return;
    Found* found = (Found*)table->found + chunk.tensor;
    Correction correction(hyper, t);
    found->update_scale = update_scale(
        hyper.max_unorm, sums[0], sums[1], __ddiv_rn(correction.root_c2, correction.c1)
    );
    if (one_scale) new_scales(found, tally, tensor);
}

// Measures the tensors that ask for it, before `qadam_step` with the same table.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 2) qadam_measure(
    const Table* __restrict__ table
) {
    __shared__ Tables tables;
    __shared__ Desk desks[WARPS];
    tables.fill();
    u64 warp = (u64)blockIdx.x * WARPS + threadIdx.x / 32;
    if (warp >= table->chunk_count) return;
    Chunk chunk = table->chunks[warp];
    Grad grad = table->grads[chunk.tensor];
    Tensor tensor = table->tensors[chunk.tensor];
    if (!(tensor.flags & MEASURED) || !is_to_step(table, grad, chunk.tensor)) return;
    measure_chunk(
        table, tensor, grad, chunk, table->hypers[tensor.hyper], threadIdx.x % 32, tables,
        &desks[threadIdx.x / 32]
    );
}
