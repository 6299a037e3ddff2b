// A small Adam-like step, written for softgpu's tests: what qadam's kernels need from a
// device, in one file. Not the product's kernel.
#include <cuda_fp16.h>
#include <cuda_bf16.h>

struct Tensor {
    void *p;
    const void *g;
    float *m;
    float *v;
    float *absmax;
    unsigned long long n;
};

struct Hyper {
    float b1, b2, one_b1, one_b2, eps, step_size, inv_c2;
};

template <typename T> __device__ float load1(const void *p, unsigned long long i);
template <> __device__ float load1<float>(const void *p, unsigned long long i) {
    return ((const float *)p)[i];
}
template <> __device__ float load1<__half>(const void *p, unsigned long long i) {
    return __half2float(((const __half *)p)[i]);
}
template <> __device__ float load1<__nv_bfloat16>(const void *p, unsigned long long i) {
    return __uint_as_float((unsigned)((const unsigned short *)p)[i] << 16);
}
template <typename T> __device__ void store1(void *p, unsigned long long i, float x);
template <> __device__ void store1<float>(void *p, unsigned long long i, float x) {
    ((float *)p)[i] = x;
}
template <> __device__ void store1<__half>(void *p, unsigned long long i, float x) {
    ((__half *)p)[i] = __float2half_rn(x);
}
template <> __device__ void store1<__nv_bfloat16>(void *p, unsigned long long i, float x) {
    unsigned u = __float_as_uint(x);
    unsigned r = (u & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    ((unsigned short *)p)[i] = (unsigned short)r;
}

__device__ float adam(const Hyper &h, float g, float &m, float &v, float p) {
    m = fmaf(h.b1, m, h.one_b1 * g);
    v = fmaf(h.b2, v, __fmul_rn(h.one_b2 * g, g));
    float d = __fsqrt_rn(v) * h.inv_c2 + h.eps;
    return fmaf(-h.step_size, __fdiv_rn(m, d), p);
}

// One warp owns 256 consecutive elements, eight a lane; the block's largest |m| is kept.
template <typename T>
__device__ void step(const Tensor *table, const unsigned *chunk_tensor,
                     const unsigned long long *chunk_start, unsigned chunks, const Hyper *hyper) {
    unsigned warp = (blockIdx.x * blockDim.x + threadIdx.x) >> 5;
    unsigned lane = threadIdx.x & 31;
    if (warp >= chunks) return;
    Tensor t = table[chunk_tensor[warp]];
    Hyper h = *hyper;
    unsigned long long base = chunk_start[warp] + 8ull * lane;
    float mx = 0.0f;
    bool whole = base + 8 <= t.n;
    bool aligned = (((size_t)t.p | (size_t)t.g | (size_t)t.m | (size_t)t.v) & 15) == 0;
    if (whole && aligned) {
        float4 *m4 = (float4 *)(t.m + base), *v4 = (float4 *)(t.v + base);
        float m[8], v[8];
        for (int k = 0; k < 2; ++k) {
            float4 a = m4[k], b = v4[k];
            m[4 * k] = a.x; m[4 * k + 1] = a.y; m[4 * k + 2] = a.z; m[4 * k + 3] = a.w;
            v[4 * k] = b.x; v[4 * k + 1] = b.y; v[4 * k + 2] = b.z; v[4 * k + 3] = b.w;
        }
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            float g = load1<T>(t.g, base + k);
            float p = adam(h, g, m[k], v[k], load1<T>(t.p, base + k));
            store1<T>(t.p, base + k, p);
            mx = fmaxf(mx, fabsf(m[k]));
        }
        for (int k = 0; k < 2; ++k) {
            m4[k] = make_float4(m[4 * k], m[4 * k + 1], m[4 * k + 2], m[4 * k + 3]);
            v4[k] = make_float4(v[4 * k], v[4 * k + 1], v[4 * k + 2], v[4 * k + 3]);
        }
    } else {
        for (unsigned long long i = base; i < base + 8 && i < t.n; ++i) {
            float m = t.m[i], v = t.v[i];
            float p = adam(h, load1<T>(t.g, i), m, v, load1<T>(t.p, i));
            store1<T>(t.p, i, p);
            t.m[i] = m;
            t.v[i] = v;
            mx = fmaxf(mx, fabsf(m));
        }
    }
#pragma unroll
    for (int d = 16; d; d >>= 1) mx = fmaxf(mx, __shfl_xor_sync(0xffffffffu, mx, d));
    if (lane == 0) t.absmax[chunk_start[warp] >> 8] = mx;
}

#define ENTRY(NAME, T)                                                                           \
    extern "C" __global__ void __launch_bounds__(256)                                            \
        NAME(const Tensor *table, const unsigned *chunk_tensor,                                  \
             const unsigned long long *chunk_start, unsigned chunks, const Hyper *hyper) {       \
        step<T>(table, chunk_tensor, chunk_start, chunks, hyper);                                \
    }

ENTRY(adam_f32, float)
ENTRY(adam_f16, __half)
ENTRY(adam_bf16, __nv_bfloat16)
