// By how much gradients and updates are cut: `src/clip.rs`, operation by operation.
#pragma once
#include "fold.cuh"

// `clip::scaled`.
__device__ __forceinline__ double scaled(double squares, float factor) {
    return __dmul_rn(squares, __dmul_rn((double)factor, (double)factor));
}

// `clip::global`.
__device__ __forceinline__ float global_factor(double squares, double max_norm) {
    double factor = __ddiv_rn(max_norm, __dadd_rn(__dsqrt_rn(squares), 1e-6));
    bool is_limited = max_norm < __longlong_as_double(0x7FF0000000000000);  // infinity
    return factor > 1.0 || !is_limited ? 1.0f : __double2float_rn(factor);
}

// `clip::update`.
__device__ __forceinline__ float update_scale(
    double max_unorm, double param_squares, double update_squares, double correction
) {
    double limit = __dmul_rn(max_unorm, __dsqrt_rn(param_squares));
    double norm = __dmul_rn(__dsqrt_rn(update_squares), correction);
    bool exceeds = limit > 0.0 && limit < norm && is_finite(norm);
    return exceeds ? __double2float_rn(__ddiv_rn(limit, norm)) : 1.0f;
}

// What gradients are multiplied by in all.
__device__ __forceinline__ float cut_factor(const Hyper& hyper, const Grad& grad) {
    float by = factor(hyper);
    return grad.cut == 0 ? by : __fmul_rn(by, global<const Cut>(grad.cut)->factor);
}

// A number's place in the order of `f32::total_cmp`.
__device__ __forceinline__ u32 order(float x) {
    u32 bits = __float_as_uint(x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float at_order(u32 order) {
    return __uint_as_float(order >> 31 ? order & 0x7FFFFFFFu : ~order);
}

// `clip::percentile`, by a warp: what the gradient is multiplied by. The history stays as it is; what is
// to be entered goes to `cut`.
__device__ __forceinline__ float percentile_factor(
    const Tensor& tensor, double squares, Cut& cut, int lane
) {
    const double most = 3.4028234663852886e38;
    float current = __double2float_rn(squares < most ? squares : most);
    if (!is_finite(squares) || current == 0.0f) return 1.0f;
    const float* history = global<const float>(tensor.history);
    const int OWN = 4;  // places of a lane
    u32 orders[OWN];
    bool zero = true;
    u32 slot = (u32)(coming_step(tensor) % HISTORY);
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        u32 place = lane + 32 * i;
        orders[i] = 0xFFFFFFFFu;  // is never counted
        if (place >= HISTORY) continue;
        float old = history[place];
        zero &= old == 0.0f;
        orders[i] = order(place == slot ? current : old);
    }
    cut.squares = current;
    if (__all_sync(WARP, zero)) {
        cut.slot = EVERY_SLOT;
        return 1.0f;
    }
    cut.slot = slot;
    // The largest that has no more than `percentile` below it is the one at that place.
    u32 limit_order = 0;
#pragma unroll 1
    for (u32 bit = 1u << 31; bit != 0; bit >>= 1) {
        u32 below = 0;
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            below += __popc(__ballot_sync(WARP, orders[i] < (limit_order | bit)));
        }
        if (below <= tensor.percentile) limit_order |= bit;
    }
    float limit = at_order(limit_order);
    if (!(current > limit)) return 1.0f;
    return __double2float_rn(__ddiv_rn(__dsqrt_rn((double)limit), __dsqrt_rn((double)current)));
}

// A lane's sum of the squares of part of a gradient.
template <typename T>
__device__ __forceinline__ void add_dense_squares(
    double& sum, u64 base, u64 start, u32 len, int lane, bool finite_only
) {
    const typename T::Bits* from = global<const typename T::Bits>(base) + start;
#pragma unroll 1
    for (u32 i = lane; i < len; i += BLOCK) {
        float x[BLOCK / 32];
#pragma unroll
        for (int k = 0; k < BLOCK / 32; k++) {
            u32 at = i + 32 * k;
            x[k] = at < len ? T::widen_number(from[at]) : 0.0f;
        }
#pragma unroll
        for (int k = 0; k < BLOCK / 32; k++) {
            add_square(sum, finite_only && !is_finite(x[k]) ? 0.0f : x[k]);
        }
    }
}

__device__ __forceinline__ void add_strided_squares(
    double& sum, u32 dtype, const Path& path, u64 start, u32 len, bool finite_only, Place place
) {
    const float* stage = (const float*)place.desk->stage;
    place.start = start;
#pragma unroll 1
    for (; len > 0; len -= place.len) {
        place.len = (int)min(len, (u32)BLOCK);
        gather(dtype, path, place);
#pragma unroll
        for (int i = place.lane; i < BLOCK; i += 32) {
            float x = stage[i];  // 0 beyond the end
            add_square(sum, finite_only && !is_finite(x) ? 0.0f : x);
        }
        __syncwarp();
        place.start += BLOCK;
    }
}

// Sums up the squares of each gradient, and then of all: `clip::gradients` to its total. Gradients that
// are not to be used count as 0.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 3) qadam_squares(
    const Table* __restrict__ table
) {
    __shared__ Desk desks[WARPS];
    int lane = threadIdx.x % 32;
    Desk* desk = &desks[threadIdx.x / 32];
    u64 warp = (u64)blockIdx.x * WARPS + threadIdx.x / 32;
    if (warp >= table->chunk_count) return;
    Chunk chunk = table->chunks[warp];
    Grad grad = table->grads[chunk.tensor];
    double squares = 0.0;
    if (is_to_step(table, grad, chunk.tensor)) {
        Tensor tensor = table->tensors[chunk.tensor];
        const Hyper& hyper = table->hypers[tensor.hyper];
        bool finite_only = !hyper.propagate;
        if (lane == 0) desk->strides = global<const Strides>(grad.strides);
        __syncwarp();
        Path path = {grad.address, grad.access, false};
        u32 dtype = tensor.grad_dtype;
        auto sum = [&](double (&sums)[1], u64 start, u32 len) {
            double& sum = sums[0];
            if (grad.access == STRIDED) {
                Place place = {0, 0, lane, desk};
                add_strided_squares(sum, dtype, path, start, len, finite_only, place);
            } else if (dtype == FLOAT32) {
                add_dense_squares<F32>(sum, path.base, start, len, lane, finite_only);
            } else if (dtype == BFLOAT16) {
                add_dense_squares<BF16>(sum, path.base, start, len, lane, finite_only);
            } else {
                add_dense_squares<F16>(sum, path.base, start, len, lane, finite_only);
            }
        };
        double sums[1];
        if (!sum_up(sums, table, tensor, chunk, lane, sum, [] {})) return;
        squares = scaled(sums[0], factor(hyper));
    } else if (chunk.start != 0) {
        return;  // its first chunk counts it in
    }
    if (lane == 0) table->squares[chunk.tensor] = squares;
    if (!arrive(table->arrived, 1, (u32)table->tensor_count, lane)) return;
    double* all = table->squares + table->tensor_count;
    double sums[1];
    total(sums, table->squares, table->tensor_count, all, lane);
    __syncwarp();
    store_sums(sums, all, lane);
}

// What each gradient is to be multiplied by, a warp a tensor; behind `qadam_squares`, with its table.
extern "C" __global__ void __launch_bounds__(WARPS * 32) qadam_cut(
    const Table* __restrict__ table
) {
    int lane = threadIdx.x % 32;
    u64 warp = (u64)blockIdx.x * WARPS + threadIdx.x / 32;
    u64 count = table->tensor_count;
    const Clip& clip = *table->clip;
    double all = count == 0 ? 0.0 : table->squares[count];
    if (warp == 0 && lane == 0 && clip.norm != 0) {
        *global<float>(clip.norm) = canonical(__double2float_rn(__dsqrt_rn(all)));
    }
    if (warp >= count) return;
    Grad grad = table->grads[warp];
    Cut cut = {1.0f, 0.0f, NO_SLOT, 0};
    if (is_to_step(table, grad, warp)) {
        Tensor tensor = table->tensors[warp];
        float shared = clip.is_limited ? global_factor(all, clip.max_norm) : 1.0f;
        float own = 1.0f;
        if (tensor.history != 0) {
            own = percentile_factor(tensor, scaled(table->squares[warp], shared), cut, lane);
        }
        cut.factor = __fmul_rn(shared, own);
    }
    if (lane == 0) ((Cut*)table->found)[warp] = cut;
}
