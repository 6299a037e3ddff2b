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

struct Tensor {
    u64 param;
    u64 m, v;              // values (32-bit) or codes (8-bit)
    u64 m_scale, v_scale;  // 8-bit only
    u64 max_v;             // as `v`, where the state has it (AMSGrad), else 0
    u64 max_v_scale;       // 8-bit only
    u64 step;              // f32, how many steps the parameter has had
    u64 len;
    u32 hyper; // index
    u32 param_dtype;
    u32 grad_dtype;
    u32 is_8bit;
};

// A gradient, which may be another tensor each step; address 0 skips the parameter.
struct Grad {
    u64 address;
    u64 strides;  // a `Strides`, where the access is STRIDED
    u32 access;
    u32 guarded;  // whether there is a `Hyper::found_inf` to look at
};

struct Chunk {
    u64 start;  // a multiple of BLOCK
    u32 len;
    u32 tensor;
};

struct Table {
    const Tensor* tensors;
    const Grad* grads;
    const Chunk* chunks;
    const Hyper* hypers;
    u64* nonfinite;  // a count, in host memory that the device can reach
    u32* arrived;    // warps that are done; 0 between launches
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
