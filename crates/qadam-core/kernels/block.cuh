// A warp's block of a tensor: how it comes from memory, is updated, and goes back.
#pragma once
#include "dynamic.cuh"
#include "table.cuh"

const int WARPS = 8;  // a thread block

// Eight elements of a block belong to a lane: two runs of four, so that a warp's accesses are
// contiguous.
const int RUNS = 2, RUN = 4, LANE = RUNS * RUN;

template <typename T>
struct alignas(sizeof(T) * RUN) Vector {
    T at[RUN];
};

// A float for each element of a block.
typedef Vector<float> Stage[BLOCK / RUN];

// A moment in memory: values, or codes and their scales.
struct Moment {
    u64 address, scale;
    Range told;  // its new scale where it has one for all blocks, else negative: each finds its own

    // The same in every lane.
    __device__ __forceinline__ bool is_told() const { return told.high >= 0.0f; }
};

// What a warp keeps in shared memory, as registers are dear.
struct Desk {
    Stage stage;             // what cannot be loaded or stored in vectors, and what waits
    Moment m, v, max_v;      // of the tensor
    u64 param, gradient;
    u32 param_dtype, grad_dtype, access, flags;
    const Strides* strides;  // where the access is STRIDED
    float factor;            // of gradients
    Coefficients c;          // of the step
    u32 nonfinite;           // gradients so far
    u8 kept[32];             // a bit an element, by each lane: what `outcome_of` was told last
};

// A block, and which of its elements a lane has.
struct Place {
    u64 start;  // in the tensor
    int len;
    int lane;
    Desk* desk;

    __device__ __forceinline__ bool whole() const { return len == BLOCK; }
    // Of a lane's vectors, counted in vectors from the block's first.
    __device__ __forceinline__ int vector(int run) const { return run * 32 + lane; }
    // A lane's first element, counted from the block's first, and the others from it on: a constant.
    __device__ __forceinline__ int first() const { return lane * RUN; }
    static __device__ __forceinline__ int beyond(int i) { return i / RUN * 32 * RUN + i % RUN; }
    // Whether the block has one of a lane's elements. (Compared with `len`, the place of each would be
    // kept, a register each.)
    __device__ __forceinline__ bool has(int i) const { return beyond(i) < len - first(); }
    // A bit for each of a lane's elements that the block has.
    __device__ __forceinline__ u32 present() const {
        u32 bits = 0;
#pragma unroll
        for (int i = 0; i < LANE; i++) bits |= (u32)has(i) << i;
        return bits;
    }
};

// How to reach the elements of a tensor.
struct Path {
    u64 base;
    u32 access;
    bool is_param;

    // Where element `i` of the tensor lies, in elements from its first.
    __device__ __forceinline__ u64 offset(u64 i, const Desk& desk) const {
        if (access != STRIDED) return i;
        const Strides* strides = desk.strides;
        u64 at = 0;
#pragma unroll 1
        for (int d = 0; d < DIMS && i > 0; d++) {
            u64 size = strides->size[d];
            at += i % size * (is_param ? strides->param[d] : strides->grad[d]);
            i /= size;
        }
        return at;
    }
};

__device__ __forceinline__ Path dense(u64 base) { return {base, VECTOR, false}; }

enum DType : u32 { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

template <typename T>
__device__ __forceinline__ void load_vectors(float (&to)[LANE], u64 base, const Place& place) {
    typedef Vector<typename T::Bits> Bits;
    const Bits* from = global<const Bits>(base) + place.start / RUN;
    typename T::Bits bits[LANE];
#pragma unroll
    for (int run = 0; run < RUNS; run++) {
        Bits vector = from[place.vector(run)];
#pragma unroll
        for (int i = 0; i < RUN; i++) bits[run * RUN + i] = vector.at[i];
    }
    widen<T>(to, bits);
}

template <typename T>
__device__ __forceinline__ void store_vectors(
    const float (&from)[LANE], u64 base, const Place& place
) {
    typedef Vector<typename T::Bits> Bits;
    Bits* to = global<Bits>(base) + place.start / RUN;
    typename T::Bits bits[LANE];
    round<T>(bits, from);
#pragma unroll
    for (int run = 0; run < RUNS; run++) {
        Bits vector;
#pragma unroll
        for (int i = 0; i < RUN; i++) vector.at[i] = bits[run * RUN + i];
        to[place.vector(run)] = vector;
    }
}

template <typename T>
__device__ __forceinline__ float load_one(u64 base, u64 at) {
    return T::widen(global<const typename T::Bits>(base)[at]);
}

template <typename T>
__device__ __forceinline__ void store_one(float from, u64 base, u64 at) {
    global<typename T::Bits>(base)[at] = T::round(from);
}

// A lane's elements in shared memory.
__device__ __forceinline__ void put(Stage& stage, const float (&from)[LANE], const Place& place) {
#pragma unroll
    for (int run = 0; run < RUNS; run++) {
        Vector<float> vector;
#pragma unroll
        for (int i = 0; i < RUN; i++) vector.at[i] = from[run * RUN + i];
        stage[place.vector(run)] = vector;
    }
}

__device__ __forceinline__ void take(float (&to)[LANE], const Stage& stage, const Place& place) {
#pragma unroll
    for (int run = 0; run < RUNS; run++) {
        Vector<float> vector = stage[place.vector(run)];
#pragma unroll
        for (int i = 0; i < RUN; i++) to[run * RUN + i] = vector.at[i];
    }
}

// Gathers a block in shared memory, an element at a time; those beyond its end are 0.
__device__ __forceinline__ void gather(u32 dtype, const Path& path, const Place& place) {
    float* stage = (float*)place.desk->stage;
#pragma unroll 1
    for (int i = place.lane; i < BLOCK; i += 32) {
        float x = 0.0f;
        if (i < place.len) {
            u64 at = path.offset(place.start + i, *place.desk);
            x = dtype == FLOAT32    ? load_one<F32>(path.base, at)
                : dtype == BFLOAT16 ? load_one<BF16>(path.base, at)
                                    : load_one<F16>(path.base, at);
        }
        stage[i] = x;
    }
    __syncwarp();
}

// Loads a lane's elements; those beyond the block's end are 0. The type is known at run time: all
// lanes branch alike, and there is one body of the update instead of nine. What cannot be loaded in
// vectors is gathered first.
__device__ __forceinline__ void load(
    float (&to)[LANE], u32 dtype, const Path& path, const Place& place
) {
    if (path.access == VECTOR && place.whole()) {
        if (dtype == FLOAT32) {
            load_vectors<F32>(to, path.base, place);
        } else if (dtype == BFLOAT16) {
            load_vectors<BF16>(to, path.base, place);
        } else {
            load_vectors<F16>(to, path.base, place);
        }
        return;
    }
    gather(dtype, path, place);
    take(to, place.desk->stage, place);
    __syncwarp();
}

__device__ __forceinline__ void store(
    const float (&from)[LANE], u32 dtype, const Path& path, const Place& place
) {
    if (path.access == VECTOR && place.whole()) {
        if (dtype == FLOAT32) {
            store_vectors<F32>(from, path.base, place);
        } else if (dtype == BFLOAT16) {
            store_vectors<BF16>(from, path.base, place);
        } else {
            store_vectors<F16>(from, path.base, place);
        }
        return;
    }
    const float* stage = (const float*)place.desk->stage;
    put(place.desk->stage, from, place);
    __syncwarp();
#pragma unroll 1
    for (int i = place.lane; i < place.len; i += 32) {
        u64 at = path.offset(place.start + i, *place.desk);
        if (dtype == FLOAT32) {
            store_one<F32>(stage[i], path.base, at);
        } else if (dtype == BFLOAT16) {
            store_one<BF16>(stage[i], path.base, at);
        } else {
            store_one<F16>(stage[i], path.base, at);
        }
    }
    __syncwarp();
}

// A lane's codes. They stay packed until they are used: unpacked, they would take four times the
// registers.
struct Codes {
    u32 of_run[RUNS];

    __device__ __forceinline__ u32 at(int i) const {
        return of_run[i / RUN] >> i % RUN * 8 & 0xFFu;
    }

    // In order.
    __device__ __forceinline__ void set(int i, u32 code) {
        of_run[i / RUN] = i % RUN == 0 ? code : of_run[i / RUN] | code << i % RUN * 8;
    }

    // Those beyond the block's end are `padding`.
    __device__ __forceinline__ void load(u64 base, const Place& place, u32 padding) {
        const u8* from = global<const u8>(base) + place.start;
#pragma unroll
        for (int run = 0; run < RUNS; run++) {
            if (place.whole()) {
                of_run[run] = ((const u32*)from)[place.vector(run)];
                continue;
            }
#pragma unroll
            for (int i = 0; i < RUN; i++) {
                int own = run * RUN + i;
                set(own, place.has(own) ? (from + place.first())[place.beyond(own)] : padding);
            }
        }
    }

    // Puts those in memory back for the elements of `kept`.
    __device__ __forceinline__ void keep(u32 kept, u64 base, const Place& place) {
        Codes old;
        old.load(base, place, 0);
#pragma unroll
        for (int i = 0; i < LANE; i++) {
            if (!(kept >> i & 1u)) continue;
            u32 mask = 0xFFu << i % RUN * 8;
            of_run[i / RUN] = (of_run[i / RUN] & ~mask) | (old.of_run[i / RUN] & mask);
        }
    }

    __device__ __forceinline__ void store(u64 base, const Place& place) const {
        u8* to = global<u8>(base) + place.start;
#pragma unroll
        for (int run = 0; run < RUNS; run++) {
            if (place.whole()) {
                ((u32*)to)[place.vector(run)] = of_run[run];
                continue;
            }
#pragma unroll
            for (int i = 0; i < RUN; i++) {
                int own = run * RUN + i;
                if (place.has(own)) (to + place.first())[place.beyond(own)] = (u8)at(own);
            }
        }
    }
};

__device__ __forceinline__ int warp_sum(int x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(WARP, x, distance);
    return x;
}

// Moments that are not, as can be where a gradient was not, count as 0.
__device__ __forceinline__ void make_finite(float (&moment)[LANE]) {
#pragma unroll
    for (int i = 0; i < LANE; i++) moment[i] = is_finite(moment[i]) ? moment[i] : 0.0f;
}

// What became of a block: how many of its gradients were not finite, whether elements were kept as they
// were (KEEPS), and whether all were (KEPT). 0 is the usual. (Not a structure: NVRTC then takes minutes.)
typedef u32 Outcome;
const u32 NONFINITE = 0xFFFFu, KEEPS = 1u << 16, KEPT = 1u << 17;

// By the elements that a lane kept, and those whose gradients were not finite; a bit each. Others than
// the block has do not count.
__device__ __forceinline__ Outcome outcome_of(u32 kept, u32 nonfinite, const Place& place) {
    u32 present = place.present();
    place.desk->kept[place.lane] = (u8)kept;
    Outcome outcome = warp_sum(__popc(nonfinite & present));
    if (__any_sync(WARP, kept & present)) outcome |= KEEPS;
    if (__all_sync(WARP, (kept & present) == present)) outcome |= KEPT;
    return outcome;
}

// A lane's elements of a block, with their moments as values.
struct Block {
    float p[LANE], m[LANE], v[LANE];

    // Makes gradients effective, and sets a bit in `kept` for each element that is left as it is for
    // its gradient of zero. Returns whether the whole block's need neither clamping nor skipping.
    __device__ __forceinline__ bool prepare(
        float (&g)[LANE], const Coefficients& c, float factor, const Place& place, u32& kept
    ) const {
        kept = 0;
        if (c.skip_zeros()) {  // the same in every lane, as is the next
#pragma unroll
            for (int i = 0; i < LANE; i++) kept |= (u32)(g[i] == 0.0f) << i;
            kept &= place.present();
        }
        if (factor != 1.0f) {
#pragma unroll
            for (int i = 0; i < LANE; i++) g[i] = __fmul_rn(g[i], factor);
        }
        bool usual = kept == 0;
#pragma unroll
        for (int i = 0; i < LANE; i++) {
            g[i] = effective_gradient(p[i], g[i], c);
            usual &= fabsf(g[i]) <= GRADIENT_LIMIT;
        }
        return __all_sync(WARP, usual);
    }

    // Updates them. Elements beyond the block's end are zero and have zero gradients.
    __device__ __forceinline__ Outcome update(
        float (&g)[LANE], const Coefficients& c, float factor, const Place& place
    ) {
        u32 kept;
        if (prepare(g, c, factor, place, kept)) {
            bool nan = false;
#pragma unroll
            for (int i = 0; i < LANE; i++) {
                set(i, advance(at(i), g[i], c));
                nan |= is_nan(p[i]) | is_nan(m[i]) | is_nan(v[i]);
            }
            if (nan) {
#pragma unroll
                for (int i = 0; i < LANE; i++) set(i, canonical(at(i)));
            }
            return 0;
        }
        u32 nonfinite = 0;
#pragma unroll
        for (int i = 0; i < LANE; i++) {
            if (kept >> i & 1u) continue;
            Element e = at(i);
            nonfinite |= (u32)!::update(e, g[i], c) << i;
            set(i, e);
        }
        if (!c.propagate()) kept |= nonfinite;
        return outcome_of(kept, nonfinite, place);
    }

    // `update` in two halves, for a third moment and for what is only measured. This one makes the new
    // first and second moments; it sets a bit in `kept` for each element that stays as it is.
    __device__ __forceinline__ Outcome average(
        float (&g)[LANE], const Coefficients& c, float factor, const Place& place, u32& kept
    ) {
        if (prepare(g, c, factor, place, kept)) {
#pragma unroll
            for (int i = 0; i < LANE; i++) ::average(m[i], v[i], g[i], c);
            return 0;
        }
        u32 nonfinite = 0;
#pragma unroll
        for (int i = 0; i < LANE; i++) {
            if (kept >> i & 1u) continue;
            bool finite = is_finite(g[i]);
            nonfinite |= (u32)!finite << i;
            if (finite || c.propagate()) {
                ::average(m[i], v[i], finite ? clamped(g[i]) : g[i], c);
            }
        }
        if (!c.propagate()) kept |= nonfinite;
        return outcome_of(kept, nonfinite, place);
    }

    // And this one the parameter, by the second moments in `v`.
    __device__ __forceinline__ void move(const Coefficients& c, u32 kept) {
#pragma unroll
        for (int i = 0; i < LANE; i++) {
            if (kept >> i & 1u) continue;
            set(i, canonical({moved(p[i], m[i], v[i], c), m[i], v[i]}));
        }
    }

    __device__ __forceinline__ Element at(int i) const { return {p[i], m[i], v[i]}; }

    __device__ __forceinline__ void set(int i, const Element& e) {
        p[i] = e.p;
        m[i] = e.m;
        v[i] = e.v;
    }
};

// The scale of a block that has one.
__device__ __forceinline__ float* own_scale(const Moment& moment, const Place& place) {
    return global<float>(moment.scale) + place.start / BLOCK;
}

// In bytes from a moment's first scale, where that of a block is.
__device__ __forceinline__ u64 scale_offset(const Place& place) {
    return place.desk->m.is_told() ? 0 : place.start / BLOCK * sizeof(float);
}

__device__ __forceinline__ void load_moments(
    Block& block, bool is_8bit, const Place& place, const Tables& tables
) {
    Moment from_m = place.desk->m, from_v = place.desk->v;
    if (!is_8bit) {
        load(block.m, FLOAT32, dense(from_m.address), place);
        load(block.v, FLOAT32, dense(from_v.address), place);
        return;
    }
    Codes m, v;
    m.load(from_m.address, place, 127);
    v.load(from_v.address, place, 0);
    u64 offset = scale_offset(place);
    float m_scale = usable_scale(*global<const float>(from_m.scale + offset));
    float v_scale = usable_scale(*global<const float>(from_v.scale + offset));
#pragma unroll
    for (int i = 0; i < LANE; i++) {
        block.m[i] = __fmul_rn(tables.of_signed.value[m.at(i)], m_scale);
        block.v[i] = __fmul_rn(tables.of_unsigned.value[v.at(i)], v_scale);
    }
}

// With `keep`, scales do not fall: elements that were skipped keep their codes. A scale for all blocks
// is not written: other warps read the old one.
__device__ __forceinline__ void store_second_moment(
    const float (&v)[LANE], const Moment& to, bool is_8bit, const Place& place,
    const Tables& tables, bool keep
) {
    if (!is_8bit) {
        store(v, FLOAT32, dense(to.address), place);
        return;
    }
    float scale = to.told.high;
    bool own = !to.is_told();
    if (own) {
        scale = warp_max(v);
        if (keep) scale = fmaxf(scale, usable_scale(*own_scale(to, place)));
    }
    Normalizer normalizer(scale);
    Codes codes;
#pragma unroll
    for (int i = 0; i < LANE; i++) {
        codes.set(i, tables.encode_second_moment(normalizer.apply(v[i]), v[i] > 0.0f));
    }
    codes.store(to.address, place);
    __syncwarp();  // every lane has read the old scale
    if (own && place.lane == 0) *own_scale(to, place) = scale;
}

__device__ __forceinline__ void load_second_moment(
    float (&v)[LANE], const Moment& from, bool is_8bit, const Place& place, const Tables& tables
) {
    if (!is_8bit) {
        load(v, FLOAT32, dense(from.address), place);
        return;
    }
    Codes codes;
    codes.load(from.address, place, 0);
    float scale = usable_scale(*global<const float>(from.scale + scale_offset(place)));
#pragma unroll
    for (int i = 0; i < LANE; i++) v[i] = __fmul_rn(tables.of_unsigned.value[codes.at(i)], scale);
}

// As `store_second_moment`, for both moments of a block; the second goes to `v`.
__device__ __forceinline__ void store_moments(
    const Block& block, const Moment& to_m, const Moment& to_v, bool is_8bit, const Place& place,
    const Tables& tables, bool keep
) {
    if (!is_8bit) {
        store(block.m, FLOAT32, dense(to_m.address), place);
        store(block.v, FLOAT32, dense(to_v.address), place);
        return;
    }
    float m_scale = to_m.told.high, v_scale = to_v.told.high;
    bool own = !to_m.is_told();
    if (own) {
        m_scale = warp_max(block.m);
        v_scale = warp_max(block.v);
        if (keep) {
            m_scale = fmaxf(m_scale, usable_scale(*own_scale(to_m, place)));
            v_scale = fmaxf(v_scale, usable_scale(*own_scale(to_v, place)));
        }
    }
    Normalizer m_normalizer(m_scale), v_normalizer(v_scale);
    Codes m, v;
#pragma unroll
    for (int i = 0; i < LANE; i++) {
        m.set(i, tables.encode_signed(m_normalizer.apply(block.m[i])));
        float x = v_normalizer.apply(block.v[i]);
        v.set(i, tables.encode_second_moment(x, block.v[i] > 0.0f));
    }
    m.store(to_m.address, place);
    v.store(to_v.address, place);
    __syncwarp();  // every lane has read the old scales
    if (own && place.lane == 0) {
        *own_scale(to_m, place) = m_scale;
        *own_scale(to_v, place) = v_scale;
    }
}

// Writes on a warp's desk what it needs once a block. New scales are known if `found` says them.
__device__ __forceinline__ void fill(
    Desk* desk, const Tensor& tensor, const Grad& grad, float factor, const Found* found
) {
    bool one_scale = tensor.flags & ONE_SCALE;
    Range told[3];
#pragma unroll
    for (int i = 0; i < 3; i++) {
        told[i] = {0.0f, one_scale ? 0.0f : -1.0f};
        if (one_scale && found != nullptr && tensor.flags & MEASURED) told[i] = found->scale[i];
    }
    desk->m = {tensor.m, tensor.m_scale, told[0]};
    desk->v = {tensor.v, tensor.v_scale, told[1]};
    desk->max_v = {tensor.max_v, tensor.max_v_scale, told[2]};
    desk->param = tensor.param;
    desk->gradient = grad.address;
    desk->param_dtype = tensor.param_dtype;
    desk->grad_dtype = tensor.grad_dtype;
    desk->access = grad.access;
    desk->flags = tensor.flags;
    desk->strides = global<const Strides>(grad.strides);
    desk->factor = factor;
}
