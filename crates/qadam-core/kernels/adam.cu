// Adam for all tensors of an optimizer in one launch.
//
// The launch's work is a list of chunks of whole 256-element blocks; a warp owns a chunk and, within
// it, one block at a time, eight elements a lane. Once the tables are filled, warps never wait for
// each other: the scale of a block is a warp's own, and the step counts are advanced by the warp that
// finishes last, when all others have read them.
//
// Everything that changes from step to step (hyperparameters, step counts, gradient pointers) is read
// from device memory, so that a captured graph stays right when they change.
#include "measure.cuh"

// Updates one block and returns how many of its gradients were not finite.
__device__ __forceinline__ int step_block(
    const Place& place, const Coefficients& c, const Tables& tables
) {
    Desk& desk = *place.desk;
    u32 flags = desk.flags;
    // the same in every lane, as are all conditions here
    bool is_8bit = flags & IS_8BIT, is_ratio = flags & IS_RATIO, amsgrad = flags & IS_AMSGRAD;
    Block block;
    float g[LANE];
    load(g, desk.grad_dtype, {desk.gradient, desk.access, false}, place);
    load(block.p, desk.param_dtype, {desk.param, desk.access, true}, place);
    if (is_ratio) {
        load_ratios(block, amsgrad, place);
    } else {
        load_moments(block, is_8bit, place, tables);
    }
    Outcome outcome;
    if (!amsgrad) {
        outcome = block.update(g, c, desk.factor, place);
    } else {
        u32 kept;
        outcome = block.average(g, c, desk.factor, place, kept);
        // The largest second moments come in the registers of the gradients, which are of no more use.
        // Second moments proper are put away at once, and leave theirs to the largest.
        load_largest(g, is_8bit, is_ratio, place, tables);
#pragma unroll
        for (int i = 0; i < LANE; i++) {
            if (kept >> i & 1u) continue;
            g[i] = maximum(g[i], block.v[i]);
            block.v[i] = canonical(block.v[i]);
        }
        if ((outcome & NONFINITE) > 0 && is_8bit) make_finite(block.v);
        if (is_ratio) {
            put(desk.stage, block.v, place);
            __syncwarp();  // where the block stays, the next one may find them on the stage
        } else if (!(outcome & KEPT) || desk.v.is_told()) {
            store_second_moment(block.v, desk.v, is_8bit, place, tables, outcome & KEEPS);
        }
#pragma unroll
        for (int i = 0; i < LANE; i++) block.v[i] = g[i];
        block.move(c, kept);
    }
    // A scale of its own stays with the codes of a block that was kept; one for all may be another.
    bool stays = is_8bit && (outcome & KEPT) && !desk.m.is_told();
    if (outcome != 0 && is_8bit) {
        make_finite(block.m);
        make_finite(block.v);
    }
    if (is_ratio && !stays) store_ratios(block, amsgrad, place, outcome & KEEPS);
    store(block.p, desk.param_dtype, {desk.param, desk.access, true}, place);
    if (!is_ratio && !stays) {
        const Moment& v = amsgrad ? desk.max_v : desk.v;
        store_moments(block, desk.m, v, is_8bit, place, tables, outcome & KEEPS);
    }
    return outcome & NONFINITE;
}

__device__ __forceinline__ void step_chunk(
    const Tensor& tensor, const Grad& grad, const Chunk& chunk, const Hyper& hyper,
    const Found* found, int lane, const Tables& tables, Desk* desk
) {
    Coefficients c = coefficients(hyper, coming_step(tensor));
    if (tensor.flags & MEASURED) {
        c.step = __fmul_rn(c.step, found->update_scale);
        c.carry = __fmul_rn(c.carry, found->update_scale);
    }
    if (lane == 0) {
        fill(desk, tensor, grad, cut_factor(hyper, grad), found);
        desk->c = c;
        desk->nonfinite = 0;
    }
    __syncwarp();
    Place place = {chunk.start, BLOCK, lane, desk};
#pragma unroll 1
    for (u32 left = chunk.len; left > 0; left -= place.len) {
        place.len = (int)min(left, (u32)BLOCK);
        u32 nonfinite = step_block(place, c, tables);
        if (nonfinite > 0 && lane == 0) desk->nonfinite += nonfinite;
        place.start += BLOCK;
    }
}

// What is left when all of a tensor has been updated: scales that every warp has read, the gradient's
// norm among those that limit the next ones, and the step count.
__device__ __forceinline__ void finish(
    const Tensor& tensor, const Grad& grad, const Found* found
) {
    if ((tensor.flags & ONE_SCALE) && (tensor.flags & MEASURED)) {
        u64 at[3] = {tensor.m_scale, tensor.v_scale, tensor.max_v_scale};
#pragma unroll
        for (int i = 0; i < 3; i++) {
            if (at[i] == 0) continue;
            if (i > 0 && (tensor.flags & IS_RATIO)) {
                *global<Range>(at[i]) = found->scale[i];
            } else {
                *global<float>(at[i]) = found->scale[i].high;
            }
        }
    }
    if (tensor.history != 0 && grad.cut != 0) {
        const Cut* cut = global<const Cut>(grad.cut);
        float* history = global<float>(tensor.history);
        if (cut->slot < HISTORY) history[cut->slot] = cut->squares;
        if (cut->slot == EVERY_SLOT) {
#pragma unroll 1
            for (u32 i = 0; i < HISTORY; i++) history[i] = cut->squares;
        }
    }
    float* step = global<float>(tensor.step);
    *step = __fadd_rn(*step, 1.0f);
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
    const Found* found = (const Found*)table->found;
    if (is_to_step(table, grad, chunk.tensor)) {
        Tensor tensor = table->tensors[chunk.tensor];
        Desk* desk = &desks[threadIdx.x / 32];
        step_chunk(
            tensor, grad, chunk, table->hypers[tensor.hyper], found + chunk.tensor, lane, tables,
            desk
        );
        if (lane == 0 && desk->nonfinite > 0) {
            atomicAdd_system(table->nonfinite, (u64)desk->nonfinite);
        }
    }
    // By the last warp to get here: every other is done with its chunk.
    if (!arrive(table->arrived, 1, (u32)table->chunk_count, lane)) return;
    for (u64 i = lane; i < table->tensor_count; i += 32) {
        Grad grad = table->grads[i];
        if (is_to_step(table, grad, i)) finish(table->tensors[i], grad, found + i);
    }
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
            bool counts = place.has(i) && !(hyper.skip_zeros && g[i] == 0.0f);
            nonfinite += counts && !finite;
        }
    }
    if (nonfinite > 0) atomicAdd_system(&counts[chunk.tensor], nonfinite);
}
