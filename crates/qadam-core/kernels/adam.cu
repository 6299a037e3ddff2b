// Adam for all tensors of an optimizer in one launch.
//
// The launch's work is a list of chunks of whole 256-element blocks; a warp owns a chunk and, within
// it, one block at a time, eight elements a lane. Once the tables are filled, warps never wait for
// each other: the scale of a block is a warp's own, and the step counts are advanced by the warp that
// finishes last, when all others have read them.
//
// Everything that changes from step to step (hyperparameters, step counts, gradient pointers) is read
// from device memory, so that a captured graph stays right when they change.
#include "block.cuh"

// Updates one block and returns how many of its gradients were not finite.
__device__ __forceinline__ int step_block(
    const Tensor& tensor, const Path& param, const Path& grad, const Place& place,
    const Coefficients& c, const Tables& tables
) {
    Desk& desk = *place.desk;
    Block block;
    float g[LANE];
    load(g, tensor.grad_dtype, grad, place);
    load(block.p, tensor.param_dtype, param, place);
    load_moments(block, tensor.is_8bit, place, tables);
    Outcome outcome;
    bool amsgrad = desk.max_v.address != 0;  // the same in every lane, as are all conditions here
    if (!amsgrad) {
        outcome = block.update(g, c, desk.factor, place);
    } else {
        u32 kept;
        outcome = block.average(g, c, desk.factor, place, kept);
        // The largest second moments come in the registers of the gradients, which are of no more use.
        // Second moments proper are stored at once, and leave theirs to the largest.
        load_second_moment(g, desk.max_v, tensor.is_8bit, place, tables);
#pragma unroll
        for (int i = 0; i < LANE; i++) {
            if (kept >> i & 1u) continue;
            g[i] = maximum(g[i], block.v[i]);
            block.v[i] = canonical(block.v[i]);
        }
        if ((outcome & NONFINITE) > 0 && tensor.is_8bit) make_finite(block.v);
        if (!(outcome & KEPT)) {
            store_second_moment(block.v, desk.v, tensor.is_8bit, place, tables, outcome & KEEPS);
        }
#pragma unroll
        for (int i = 0; i < LANE; i++) block.v[i] = g[i];
        block.move(c, kept);
    }
    store(block.p, tensor.param_dtype, param, place);
    if (outcome != 0 && tensor.is_8bit) {
        if (outcome & KEPT) return outcome & NONFINITE;
        make_finite(block.m);
        make_finite(block.v);
    }
    const Moment& v = amsgrad ? desk.max_v : desk.v;
    store_moments(block, desk.m, v, tensor.is_8bit, place, tables, outcome & KEEPS);
    return outcome & NONFINITE;
}

__device__ __forceinline__ u32 step_chunk(
    const Tensor& tensor, const Grad& grad, const Chunk& chunk, const Hyper& hyper, int lane,
    const Tables& tables, Desk* desk
) {
    u64 t = (u64)*global<const float>(tensor.step) + 1;
    Coefficients c = coefficients(hyper, t);
    if (lane == 0) {
        desk->strides = global<const Strides>(grad.strides);
        desk->m = {tensor.m, tensor.m_scale};
        desk->v = {tensor.v, tensor.v_scale};
        desk->max_v = {tensor.max_v, tensor.max_v_scale};
        desk->factor = factor(hyper);
    }
    __syncwarp();
    Path param = {tensor.param, grad.access, true};
    Path gradient = {grad.address, grad.access, false};
    u32 nonfinite = 0;
    Place place = {chunk.start, BLOCK, lane, desk};
#pragma unroll 1
    for (u32 left = chunk.len; left > 0; left -= place.len) {
        place.len = (int)min(left, (u32)BLOCK);
        nonfinite += step_block(tensor, param, gradient, place, c, tables);
        place.start += BLOCK;
    }
    return nonfinite;
}

// Three thread blocks a multiprocessor: 80 registers, and none spilled.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 3) qadam_step(const Table* __restrict__ table) {
    __shared__ Tables tables;
    __shared__ Desk desks[WARPS];
    tables.fill();
    int lane = threadIdx.x % 32;
    u64 warp = (u64)blockIdx.x * WARPS + threadIdx.x / 32;
    if (warp >= table->chunk_count) return;
    Chunk chunk = table->chunks[warp];
    Grad grad = table->grads[chunk.tensor];
    if (is_to_step(table, grad, chunk.tensor)) {
        Tensor tensor = table->tensors[chunk.tensor];
        u32 nonfinite = step_chunk(
            tensor, grad, chunk, table->hypers[tensor.hyper], lane, tables, &desks[threadIdx.x / 32]
        );
        if (nonfinite > 0 && lane == 0) atomicAdd_system(table->nonfinite, (u64)nonfinite);
    }
    // The last warp to get here advances the step counts: every other has read them.
    __syncwarp();
    u32 before = 0;
    if (lane == 0) {
        __threadfence();
        before = atomicAdd(table->arrived, 1u);
    }
    if (__shfl_sync(WARP, before, 0) + 1 < table->chunk_count) return;
    for (u64 i = lane; i < table->tensor_count; i += 32) {
        if (!is_to_step(table, table->grads[i], i)) continue;
        float* step = (float*)table->tensors[i].step;
        *step = __fadd_rn(*step, 1.0f);
    }
    if (lane == 0) *table->arrived = 0;
}

// For `NonFinite::Raise`: adds how many of each tensor's gradients are not finite to its count, which
// the host set to 0. Writes nothing else.
extern "C" __global__ void __launch_bounds__(WARPS * 32) qadam_count(
    const Table* __restrict__ table, u64* counts
) {
    __shared__ Desk desks[WARPS];
    u64 warp = (u64)blockIdx.x * WARPS + threadIdx.x / 32;
    if (warp >= table->chunk_count) return;
    Chunk chunk = table->chunks[warp];
    Grad grad = table->grads[chunk.tensor];
    if (!is_to_step(table, grad, chunk.tensor)) return;
    Tensor tensor = table->tensors[chunk.tensor];
    const Hyper& hyper = table->hypers[tensor.hyper];
    float by = factor(hyper);
    float l2 = hyper.decoupled ? 0.0f : __double2float_rn(hyper.weight_decay);
    Path param = {tensor.param, grad.access, true};
    Path gradient = {grad.address, grad.access, false};
    Desk* desk = &desks[threadIdx.x / 32];
    if (threadIdx.x % 32 == 0) desk->strides = global<const Strides>(grad.strides);
    __syncwarp();
    u64 nonfinite = 0;
#pragma unroll 1
    for (u32 done = 0; done < chunk.len; done += BLOCK) {
        int len = (int)min(chunk.len - done, (u32)BLOCK), lane = threadIdx.x % 32;
        Place place = {chunk.start + done, len, lane, desk};
        float g[LANE], p[LANE] = {};
        load(g, tensor.grad_dtype, gradient, place);
        if (l2 != 0.0f) load(p, tensor.param_dtype, param, place);
#pragma unroll
        for (int i = 0; i < LANE; i++) {
            float scaled = __fmul_rn(g[i], by);
            bool finite = is_finite(l2 != 0.0f ? __fmaf_rn(l2, p[i], scaled) : scaled);
            bool counts = place.element(i) < len && !(hyper.skip_zeros && g[i] == 0.0f);
            nonfinite += counts && !finite;
        }
    }
    if (nonfinite > 0) atomicAdd_system(&counts[chunk.tensor], nonfinite);
}
