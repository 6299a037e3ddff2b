// Sums of squares, by the folds of src/norm.rs: of 4096 elements, then of 4096 sums, and so on.
//
// A warp makes the sums of the first level, one after the other. Whoever is the last to finish 4096 of
// them (a segment), adds these up, and whoever is the last to finish a tensor's segments, those: no
// warp waits for another.
#pragma once
#include "block_ratio.cuh"

const u32 FOLD = 4096;

// Adds a value's square to a lane's sum.
__device__ __forceinline__ void add_square(double& sum, float x) {
    sum = __fma_rn((double)x, (double)x, sum);
}

// `N` sums stand side by side, and are handed on by reference: returned as structures, they make NVRTC
// take minutes.

// Adds the upper half of the lanes to the lower until one is left; the sum is in lane 0.
template <int N>
__device__ __forceinline__ void halves(double (&sums)[N]) {
#pragma unroll 1
    for (int half = 16; half > 0; half /= 2) {
#pragma unroll
        for (int k = 0; k < N; k++) {
            sums[k] = __dadd_rn(sums[k], __shfl_down_sync(WARP, sums[k], half));
        }
    }
}

template <int N>
__device__ __forceinline__ void load_sums(double (&sums)[N], const double* from) {
#pragma unroll
    for (int k = 0; k < N; k++) sums[k] = from[k];
}

template <int N>
__device__ __forceinline__ void store_sums(const double (&sums)[N], double* to, int lane) {
    if (lane != 0) return;
#pragma unroll
    for (int k = 0; k < N; k++) to[k] = sums[k];
}

// A fold of so many values, in lane 0.
template <int N>
__device__ __forceinline__ void fold(
    double (&sums)[N], const double* values, u32 count, int lane
) {
#pragma unroll
    for (int k = 0; k < N; k++) sums[k] = 0.0;
#pragma unroll 4
    for (u32 i = lane; i < count; i += 32) {
        double next[N];
        load_sums(next, values + (u64)i * N);
#pragma unroll
        for (int k = 0; k < N; k++) sums[k] = __dadd_rn(sums[k], next[k]);
    }
    halves(sums);
}

// `norm::total`, in every lane. Sums that are yet to be added up go to `scratch`, which may be where
// the values are.
template <int N>
__device__ __forceinline__ void total(
    double (&sums)[N], const double* values, u64 count, double* scratch, int lane
) {
#pragma unroll 1
    while (count > 1) {
        u64 folds = 0;
#pragma unroll 1
        for (u64 start = 0; start < count; start += FOLD) {
            fold(sums, values + start * N, (u32)min(count - start, (u64)FOLD), lane);
            __syncwarp();  // all have read the values, among which the sum may go
            store_sums(sums, scratch + folds * N, lane);
            folds++;
        }
        __syncwarp();
        values = scratch;
        count = folds;
    }
    load_sums(sums, values);
}

// Counts `count` in. True for the warp that makes it `whole`: what the others wrote before is there to
// be read, and the counter is 0 again.
__device__ __forceinline__ bool arrive(u32* counter, u32 count, u32 whole, int lane) {
    u32 last = 0;
    __syncwarp();
    if (lane == 0) {
        __threadfence();
        last = atomicAdd(counter, count) + count == whole;
        if (last) {
            *counter = 0;
            __threadfence();
        }
    }
    last = __shfl_sync(WARP, last, 0);
    __syncwarp();
    return last;
}

// Sums up a chunk: `sum` adds a fold to a lane's sums, of which it is told where it starts and how long
// it is; `before` is called before what was summed up so far counts as done. True for the warp that
// finishes the tensor, which gets the sums of all of it.
template <int N, typename Sum, typename Before>
__device__ __forceinline__ bool sum_up(
    double (&sums)[N], const Table* table, const Tensor& tensor, const Chunk& chunk, int lane,
    Sum sum, Before before
) {
#pragma unroll
    for (int k = 0; k < N; k++) sums[k] = 0.0;
    if (tensor.len == 0) return true;  // there is one chunk
    Tally* tally = table->tallies + chunk.tensor;
    double* of_folds = table->sums + (u64)tally->fold * N;
    double* of_segments = table->nodes + (u64)tally->segment * N;
    u64 folds = (tensor.len + FOLD - 1) / FOLD, next = chunk.start / FOLD;
    u32 done = 0;
#pragma unroll 1
    for (u32 at = 0; at < chunk.len; at += FOLD) {
#pragma unroll
        for (int k = 0; k < N; k++) sums[k] = 0.0;
        sum(sums, chunk.start + at, min(chunk.len - at, FOLD));
        halves(sums);
        store_sums(sums, of_folds + next * N, lane);
        next++;
        done++;
        if (next % FOLD != 0 && at + FOLD < chunk.len) continue;
        before();
        u64 segment = (next - 1) / FOLD, first = segment * FOLD;
        u32 whole = (u32)min(folds - first, (u64)FOLD);
        if (arrive(table->segments + tally->segment + segment, done, whole, lane)) {
            fold(sums, of_folds + first * N, whole, lane);
            store_sums(sums, of_segments + segment * N, lane);
            u32 segments = (u32)((folds + FOLD - 1) / FOLD);
            if (arrive(&tally->arrived, 1, segments, lane)) {
                total(sums, of_segments, segments, of_segments, lane);
                return true;
            }
        }
        done = 0;
    }
    return false;
}
