// The update of one element: `src/rule.rs` line by line. Every operation is an intrinsic that rounds
// once, so that no compiler fuses or reorders.
#pragma once
#include "ratio.cuh"

// As `launch::Hyper` on the host lays it out.
struct Hyper {
    double lr, beta1, beta2, eps, weight_decay, max_unorm;
    u64 lr_address; // of an f32 that replaces `lr`, or 0
    u64 grad_scale; // of an f32 that gradients are divided by, or 0
    u64 found_inf;  // of an f32 that is not 0 if the step is not to be taken, or 0
    u32 decoupled;
    u32 propagate;
    u32 maximize;
    u32 skip_zeros;

    __device__ __forceinline__ bool is_off() const {
        return found_inf != 0 && *(const float*)found_inf != 0.0f;
    }
};

struct Coefficients {
    float w1, w2, carry, step, eps, l2, shrink;
    u32 dither, flags;

    static const u32 PROPAGATE = 1, SKIP_ZEROS = 2;

    __device__ __forceinline__ bool propagate() const { return flags & PROPAGATE; }
    __device__ __forceinline__ bool skip_zeros() const { return flags & SKIP_ZEROS; }
};

// Square-and-multiply, as on the host.
__device__ __forceinline__ double power(double base, u64 exponent) {
    double result = 1.0, square = base;
    while (exponent > 0) {
        if (exponent & 1) result = __dmul_rn(result, square);
        square = __dmul_rn(square, square);
        exponent >>= 1;
    }
    return result;
}

// What gradients are multiplied by: `Coefficients::with_grad_scale`.
__device__ __forceinline__ float factor(const Hyper& h) {
    float factor = 1.0f;
    if (h.grad_scale != 0) {
        factor = __double2float_rn(__ddiv_rn(1.0, (double)*(const float*)h.grad_scale));
    }
    return h.maximize ? -factor : factor;
}

// What corrects the moments' bias.
struct Correction {
    double c1, root_c2;

    __device__ __forceinline__ Correction(const Hyper& h, u64 t) {
        c1 = __dadd_rn(1.0, -power(h.beta1, t));
        root_c2 = __dsqrt_rn(__dadd_rn(1.0, -power(h.beta2, t)));
    }
};

__device__ __forceinline__ Coefficients coefficients(const Hyper& h, u64 t) {
    double lr = h.lr_address != 0 ? (double)*(const float*)h.lr_address : h.lr;
    Correction correction(h, t);
    double c1 = correction.c1, root_c2 = correction.root_c2;
    Coefficients c;
    c.w1 = __double2float_rn(__dadd_rn(1.0, -h.beta1));
    c.w2 = __double2float_rn(__dadd_rn(1.0, -h.beta2));
    double carry = __dmul_rn(__dmul_rn(lr, root_c2), h.beta1);
    c.carry = __double2float_rn(__ddiv_rn(carry, __dadd_rn(1.0, -h.beta1)));
    c.dither = (u32)t * ALONG;
    c.step = __double2float_rn(__ddiv_rn(__dmul_rn(lr, root_c2), c1));
    c.eps = __double2float_rn(__dmul_rn(h.eps, root_c2));
    c.l2 = h.decoupled ? 0.0f : __double2float_rn(h.weight_decay);
    c.shrink = h.decoupled ? __double2float_rn(__dmul_rn(lr, h.weight_decay)) : 0.0f;
    c.flags = h.propagate | h.skip_zeros << 1;
    return c;
}

struct Element {
    float p, m, v;
};

__device__ __forceinline__ float canonical(float x) {
    return is_nan(x) ? __uint_as_float(0x7FC00000u) : x;
}

__device__ __forceinline__ Element canonical(const Element& e) {
    return {canonical(e.p), canonical(e.m), canonical(e.v)};
}

// By a gradient that `factor` has been applied to.
__device__ __forceinline__ float effective_gradient(float p, float g, const Coefficients& c) {
    return c.l2 == 0.0f ? g : __fmaf_rn(c.l2, p, g);
}

const float GRADIENT_LIMIT = 9223372036854775808.0f;

// The moments after a step, by the effective gradient; NaNs are yet to be made canonical.
__device__ __forceinline__ void average(float& m, float& v, float g, const Coefficients& c) {
    m = __fmaf_rn(c.w1, g, __fmaf_rn(-c.w1, m, m));
    v = __fmaf_rn(c.w2, __fmul_rn(g, g), __fmaf_rn(-c.w2, v, v));
}

// What `c.step` multiplies, of the new first moment and the second moment that divides it.
__device__ __forceinline__ float direction(float m, float v, const Coefficients& c) {
    return __fdiv_rn(m, __fadd_rn(__fsqrt_rn(v), c.eps));
}

// The parameter after a step.
__device__ __forceinline__ float moved(float p, float m, float v, const Coefficients& c) {
    p = c.shrink == 0.0f ? p : __fmaf_rn(-c.shrink, p, p);
    return __fmaf_rn(-c.step, direction(m, v, c), p);
}

__device__ __forceinline__ float carried(
    float p, float lost, float inverse, const Coefficients& c
) {
    float share = fmaxf(__fmaf_rn(-c.eps, inverse, 1.0f), 0.0f);
    return canonical(__fmaf_rn(-c.carry, __fmul_rn(share, lost), p));
}

// `maximum` of rule.rs.
__device__ __forceinline__ float maximum(float old, float now) {
    return now > old || is_nan(now) ? now : old;
}

__device__ __forceinline__ float clamped(float g) {
    return fminf(fmaxf(g, -GRADIENT_LIMIT), GRADIENT_LIMIT);
}

// What a step makes of an element, by its effective gradient; NaNs are yet to be made canonical.
__device__ __forceinline__ Element advance(const Element& e, float g, const Coefficients& c) {
    float m = e.m, v = e.v;
    average(m, v, g, c);
    return {moved(e.p, m, v, c), m, v};
}

// `update`, by the effective gradient. Returns whether it was finite.
__device__ __forceinline__ bool update(Element& e, float g, const Coefficients& c) {
    bool finite = is_finite(g);
    if (finite) g = clamped(g);
    if (finite || c.propagate()) e = canonical(advance(e, g, c));
    return finite;
}
