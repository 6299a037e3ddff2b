// What has to be known of a whole tensor before any of it is written: how long its update is, where
// that is limited, and its new scales, where it has one a moment. src/cpu/measure.rs is the definition.
#pragma once
#include "clip.cuh"

// What a lane finds of a chunk, besides sums.
struct Gauge {
    float largest[3];  // of the new moments
    bool keeps;        // whether elements are kept
};

// Adds the squares of a block's values, eight of which each lane has in its vectors, to the lanes' sums.
__device__ __forceinline__ void add_squares(
    double& sum, const float (&values)[LANE], const Place& place
) {
    const float* stage = (const float*)place.desk->stage;
#pragma unroll
    for (int run = 0; run < RUNS; run++) {
        Vector<float> vector;
#pragma unroll
        for (int i = 0; i < RUN; i++) vector.at[i] = values[run * RUN + i];
        place.desk->stage[place.vector(run)] = vector;
    }
    __syncwarp();
#pragma unroll
    for (int i = place.lane; i < BLOCK; i += 32) {
        if (i < place.len) add_square(sum, stage[i]);
    }
    __syncwarp();
}

// The largest magnitude, or `max`; what is not finite does not count.
__device__ __forceinline__ float largest(const float (&moment)[LANE], float max) {
#pragma unroll
    for (int i = 0; i < LANE; i++) {
        float x = fabsf(moment[i]);
        max = is_finite(x) ? fmaxf(max, x) : max;
    }
    return max;
}

// Does to a block what the step will do, and writes nothing.
__device__ __forceinline__ void gauge_block(
    const Tensor& tensor, const Path& param, const Place& place,
    const Coefficients& c, bool is_limited, const Tables& tables, double (&sums)[2], Gauge& gauge
) {
    Desk& desk = *place.desk;
    bool is_8bit = tensor.flags & IS_8BIT, one_scale = tensor.flags & ONE_SCALE;
    Block block;
    float g[LANE];
    load(g, tensor.grad_dtype, {desk.gradient, param.access, false}, place);
    load(block.p, tensor.param_dtype, param, place);
    load_moments(block, is_8bit, place, tables);
    u32 kept;
    Outcome outcome = block.average(g, c, desk.factor, place, kept);
    gauge.keeps |= (outcome & KEEPS) != 0;
    if (one_scale) {
        gauge.largest[0] = largest(block.m, gauge.largest[0]);
        gauge.largest[1] = largest(block.v, gauge.largest[1]);
    }
    if (desk.max_v.address != 0) {
        load_second_moment(g, desk.max_v, is_8bit, place, tables);
#pragma unroll
        for (int i = 0; i < LANE; i++) {
            block.v[i] = kept >> i & 1u ? g[i] : maximum(g[i], block.v[i]);
        }
        if (one_scale) gauge.largest[2] = largest(block.v, gauge.largest[2]);
    }
    if (!is_limited) return;
    add_squares(sums[0], block.p, place);
#pragma unroll
    for (int i = 0; i < LANE; i++) {
        g[i] = kept >> i & 1u ? 0.0f : direction(block.m[i], block.v[i], c);
    }
    add_squares(sums[1], g, place);
}

// Adds to what is known of a tensor's new scales. As bits, numbers that are not negative have their order.
__device__ __forceinline__ void report(Tally* tally, const Gauge& gauge, int lane) {
#pragma unroll
    for (int i = 0; i < 3; i++) {
        float max[1] = {gauge.largest[i]};
        u32 bits = __float_as_uint(warp_max(max));
        if (lane == 0) atomicMax(&tally->largest[i], bits);
    }
    if (lane == 0 && gauge.keeps) atomicOr(&tally->keeps, 1u);
}

// The new scale of a moment. 0 again is what was found of it.
__device__ __forceinline__ float new_scale(u32* bits, bool keeps, u64 old) {
    float scale = __uint_as_float(atomicExch(bits, 0u));
    return keeps && old != 0 ? fmaxf(scale, usable_scale(*global<const float>(old))) : scale;
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
    if (!one_scale) return;
    bool keeps = atomicExch(&tally->keeps, 0u) != 0;
    found->scale[0] = new_scale(&tally->largest[0], keeps, tensor.m_scale);
    found->scale[1] = new_scale(&tally->largest[1], keeps, tensor.v_scale);
    found->scale[2] = new_scale(&tally->largest[2], keeps, tensor.max_v_scale);
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
