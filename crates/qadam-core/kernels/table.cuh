// What the host and the kernels share: `#[repr(C)]` in src/cuda/table.rs.
#pragma once
#include "rule.cuh"

enum Access : u32 {
    VECTOR = 0,   // dense and alike, 16-byte aligned
    SCALAR = 1,   // dense and alike, aligned to an element only
    STRIDED = 2,  // any strides
};

const int DIMS = 8;

// Dimensions from the innermost in the parameter's memory order outwards; strides in elements.
struct Strides {
    u64 size[DIMS];
    long long param[DIMS];
    long long grad[DIMS];
};

// Of a tensor.
enum Flag : u8 {
    IS_8BIT = 1,
    ONE_SCALE = 2,  // a moment, for the whole tensor; 8-bit only
    MEASURED = 4,   // there is a `Found` to look at; not without elements
    IS_RATIO = 8,   // the code, if 8-bit
    IS_AMSGRAD = 16,  // there is a third moment
};

struct Tensor {
    u64 param;
    u64 m, v;              // values (32-bit) or codes (8-bit)
    u64 m_scale, v_scale;  // 8-bit only
    u64 max_v;             // as `v`, with AMSGrad, else 0
    u64 max_v_scale;       // 8-bit only
    u64 step;              // f32, how many steps the parameter has had
    u64 len;
    u64 history;  // f32, `HISTORY` squared norms, where the gradient is limited by them, else 0
    u32 hyper;    // index
    u8 param_dtype;
    u8 grad_dtype;
    u8 flags;
    u8 percentile;
};

// A gradient, which may be another tensor each step; address 0 skips the parameter.
struct Grad {
    u64 address;
    u64 strides;  // a `Strides`, where the access is STRIDED
    u64 cut;      // a `Cut`, or 0
    u32 access;
    u32 guarded;  // whether there is a `Hyper::found_inf` to look at
};

struct Chunk {
    u64 start;  // a multiple of BLOCK; of FOLD where tensors are measured
    u32 len;
    u32 tensor;
};

// How far moments reach: of each the largest magnitude, as bits; of roots the smallest that is
// positive, or rather the negative of its square's bits. In either case the larger reaches farther, and
// 0 is what nothing reaches.
const int REACH = 5;

// Where a tensor that is being measured has got to. Counts and what else changes are 0 between
// launches.
struct Tally {
    u32 fold;     // the first of its folds
    u32 segment;  // the first of its segments
    u32 arrived;  // segments that are done
    u32 keeps;    // whether elements are kept
    u32 reach[REACH];  // of the new moments
    u32 unused;
};

// What was found of a tensor before any of it is written.
struct Found {
    float update_scale;
    u32 unused;
    Range scale[3];  // new ones of the moments, where they have one each
};

// How a gradient is cut, and what the step that uses it has to remember.
struct Cut {
    float factor;
    float squares;  // of its norm
    u32 slot;       // its place in the history, or one of the following
    u32 unused;
};

const u32 HISTORY = 100;
const u32 EVERY_SLOT = HISTORY, NO_SLOT = HISTORY + 1;

// What gradients are cut to.
struct Clip {
    double max_norm;
    u64 norm;  // of an f32 that gets the norm of all gradients, or 0
    u32 is_limited;
    u32 unused;
};

struct Table {
    const Tensor* tensors;
    const Grad* grads;
    const Chunk* chunks;
    const Hyper* hypers;
    u64* nonfinite;  // a count, in host memory that the device can reach
    u32* arrived;    // warps that are done, or tensors; 0 between launches
    Tally* tallies;  // one a tensor, where something is to be measured
    u32* segments;   // folds that are done; 0 between launches
    double* sums;    // of folds
    double* nodes;   // of segments
    void* found;     // a `Found` a tensor, or a `Cut`
    double* squares; // of gradients, one a tensor; their total follows
    const Clip* clip;
    u64 chunk_count;
    u64 tensor_count;
};

template <typename T>
__device__ __forceinline__ T* global(u64 address) {
    return (T*)__cvta_global_to_generic(address);
}

// Whether a tensor has a gradient, and nothing says that it is not to be used.
__device__ __forceinline__ bool is_to_step(const Table* table, const Grad& grad, u64 tensor) {
    if (grad.address == 0) return false;
    return !grad.guarded || !table->hypers[table->tensors[tensor].hyper].is_off();
}

// The number of the coming step.
__device__ __forceinline__ u64 coming_step(const Tensor& tensor) {
    return (u64)*global<const float>(tensor.step) + 1;
}
