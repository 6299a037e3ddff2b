// The largest |x| of each 256-element block: a warp reduction, then shared memory and a
// barrier. Also a few library-shaped functions, to see what NVRTC emits for them.
#include <cuda_fp16.h>
#include <cuda_bf16.h>
__constant__ float scale[4] = {1.0f, 0.5f, 0.25f, 0.125f};
__device__ unsigned long long total;

extern "C" __global__ void block_max(const float *x, float *out, unsigned long long n) {
    __shared__ float part[8];
    unsigned long long i = (unsigned long long)blockIdx.x * 256 + threadIdx.x;
    float a = i < n ? fabsf(x[i]) : 0.0f;
    for (int d = 16; d; d >>= 1) a = fmaxf(a, __shfl_xor_sync(~0u, a, d));
    if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = a;
    __syncthreads();
    if (threadIdx.x < 8) {
        a = part[threadIdx.x];
        for (int d = 4; d; d >>= 1) a = fmaxf(a, __shfl_xor_sync(0xffu, a, d));
        if (threadIdx.x == 0) {
            out[blockIdx.x] = a * scale[blockIdx.x & 3];
            atomicAdd(&total, 1ull);
        }
    }
}

// Square-and-multiply power, f64 division and square root, local arrays, a loop.
extern "C" __global__ void powers(const double *b, const unsigned *t, double *out, unsigned n) {
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    double r = 1.0, x = b[i];
    for (unsigned k = t[i]; k; k >>= 1) {
        if (k & 1) r *= x;
        x *= x;
    }
    out[i] = __dsqrt_rn(1.0 - r) / (1.0 - r);
}

__device__ __noinline__ float twice(float x, int k) { return k > 0 ? x + x : -x; }

extern "C" __global__ void mixed(const float *x, float *out, int *iout, unsigned n, int k) {
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float a = twice(x[i], k);
    float local[8];
    for (int j = 0; j < 8; ++j) local[(j * k) & 7] = a + j;
    out[i] = local[i & 7];
    int q = __float2int_rn(a) / k, r = __float2int_rz(a) % k;
    iout[i] = q + r + __popc(i) + __clz(i) + __ffs(i) + (int)__brev(i)
        + (int)__float2uint_rd(fabsf(a)) + __vcmpgts2(i, 3) + (int)__byte_perm(i, 0x01020304, 0x5140)
        + (int)__umulhi(i, 0x9e3779b9u) + (int)rintf(a) + (int)floorf(a) + (int)truncf(a)
        + __ballot_sync(__activemask(), a > 1.0f);
    atomicMax(&iout[0], 0);
    __half2 hh = __floats2half2_rn(a, -a);
    out[i] += __low2float(hh) + __bfloat162float(__float2bfloat16_rn(a)) + copysignf(1.0f, a);
}

extern "C" __global__ void dynshared(const float *x, float *out) {
    extern __shared__ float sh[];
    sh[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    switch (threadIdx.x & 7) {
    case 0: out[threadIdx.x] = sh[0]; break;
    case 1: out[threadIdx.x] = sh[1] * 2; break;
    case 2: out[threadIdx.x] = sh[2] - 2; break;
    case 3: out[threadIdx.x] = sqrtf(sh[5]); break;
    case 4: out[threadIdx.x] = sh[7] / sh[3]; break;
    case 5: out[threadIdx.x] = sh[blockDim.x - 1 - threadIdx.x]; break;
    case 6: out[threadIdx.x] = 1.0f / sh[4]; break;
    default: out[threadIdx.x] = 7.0f;
    }
}
