// Where most pixels of a tile are masked, neighbours share their work: one map per offset, and sums over boxes of it.
//
//   dist(p, d) = sum_{u in W_d} D_d(p + u) + sum_{u not in W_d} E(p + u)         W_d = {u in the window: d + u in the search square}
//   D_d(x) = sum_c (I_c(x + d) - I_c(x))^2,   E(x) = sum_c I_c(x)^2
//
// One warp is one block. It owns a tile and walks down its rows, a lane on each of 32 columns: the tile's and `half` on either
// side. kSize offsets below each other walk together, so that the rows they have in common are read once. Sums along a column
// stay in registers (doubling: 9 = 8 + 1), sums along a row go from lane to lane. Only non-negative numbers are ever added: a
// running sum with subtraction would lose float32 digits.
//
// W_d is cut where d + u leaves the square. By symmetry that need be known on one side only: for offsets that point up or left
// the walk turns the tile over (Lines), so that d >= 0 and the last rows or columns of the window are those that fall outside.
//
// No float is ever added in an order that depends on scheduling. The host chooses the SSG_* numbers (ops/ssg_cuda_dense.py).
#ifndef SSG_DENSE_CUH
#define SSG_DENSE_CUH

#include "ssg_entries.cuh"

constexpr int kWhole = kRadius - kHalf;         // offsets up to here cut nothing off the window
constexpr int kChannels = SSG_CHANNELS;
constexpr int kRows = SSG_ROWS;                 // of a tile
constexpr int kColumns = 32 - 2 * kHalf;
constexpr int kLines = kRows + 2 * kHalf;       // rows that the windows of a tile cover
constexpr int kGroup = 4;                       // offsets that walk together
constexpr int kLevels = 4;                      // a window has at most 15 columns: 8 + 4 + 2 + 1
static_assert(kWindow > 1 && kWindow < 16, "the sums by doubling are made for windows of 3 to 15");

extern __shared__ float4 shared_memory[];

// One image of a batch, and one tile of it.
struct Picture {
    const float* at;                            // [C, H, W]
    int height, width, y0, x0;
};

// The tile as seen by the offsets of one column dx and one vertical direction.
struct Lines {
    int down, right;                            // 1, or -1 for a tile turned over
    int dx;                                     // >= 0 in the direction `right`
    int columns_inside;                         // of the window
    int first_row, base, moved;                 // row 0 of the walk; columns of I(x) and I(x + d) in the image

    __device__ Lines(const Picture& picture, int vertical, int offset_x) {
        const int lane = threadIdx.x;
        down = vertical;
        right = offset_x < 0 ? -1 : 1;
        dx = right * offset_x;
        columns_inside = kHalf + 1 + min(kHalf, kRadius - dx);
        first_row = down > 0 ? picture.y0 - kHalf : picture.y0 + kRows - 1 + kHalf;
        const int x = right > 0 ? picture.x0 - kHalf + lane : picture.x0 + kColumns - 1 + kHalf - lane;
        base = inside(x, picture.width);
        moved = inside(x + offset_x, picture.width);
    }
    // Reflected; what lies farther out belongs to no pixel of the image and only has to be readable.
    static __device__ __forceinline__ int inside(int i, int n) { return max(0, min(reflect(i, n), n - 1)); }
    __device__ __forceinline__ bool cuts_columns() const { return columns_inside < kWindow; }
    __device__ __forceinline__ int row(const Picture& picture, int line) const { return inside(first_row + down * line, picture.height); }
    // Place in the tile of the pixel whose window begins at this lane and at line i.
    __device__ __forceinline__ int tile_row(int i) const { return down > 0 ? i : kRows - 1 - i; }
    __device__ __forceinline__ int tile_column() const { return right > 0 ? (int)threadIdx.x : kColumns - 1 - (int)threadIdx.x; }
    __device__ __forceinline__ int cell(int i) const { return tile_row(i) * kColumns + tile_column(); }
};

__device__ __forceinline__ void read(const Picture& picture, int row, int column, float (&value)[kChannels]) {
    const unsigned at = (unsigned)row * picture.width + column;     // 32 bits beside a pointer that all lanes share
    const size_t plane = (size_t)picture.height * picture.width;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) value[c] = (picture.at + c * plane)[at];
}

// Sums of the last kCount values of a sequence: the partial sums of 2^kBit values, and those above. The shortest are the newest.
// Recursive, as is Sums: every index has to be known when the compiler looks for arrays that fit into registers.
template <int kCount, int kBit = 0>
struct Running {
    static constexpr bool kLast = kCount >> (kBit + 1) == 0;
    static constexpr int kAt = kCount & ((1 << kBit) - 1);      // values that the shorter sums cover
    static constexpr int kDepth = kLast ? kAt : 1 << kBit;      // sums that anyone looks back to
    float past[kDepth > 0 ? kDepth : 1];
    Running<kLast ? 0 : kCount, kBit + 1> longer;

    __device__ __forceinline__ Running() {
#pragma unroll
        for (int i = 0; i < kDepth; ++i) past[i] = 0.f;
    }
    __device__ __forceinline__ float feed(float partial, float total = 0.f) {
        if constexpr ((kCount >> kBit & 1) != 0) {
            if constexpr (kAt == 0)
                total = partial;
            else
                total += past[kAt - 1];
        }
        float next = 0.f;
        if constexpr (!kLast) next = partial + past[kDepth - 1];
#pragma unroll
        for (int i = kDepth - 1; i > 0; --i) past[i] = past[i - 1];
        if constexpr (kDepth > 0) past[0] = partial;
        if constexpr (kLast)
            return total;
        else
            return longer.feed(next, total);
    }
};
template <int kBit>
struct Running<0, kBit> {};

// kSize of them side by side, the first over kCount values, each of the others over kStep fewer.
template <int kSize, int kCount, int kStep>
struct Sums {
    Running<kCount> first;
    Sums<kSize - 1, kCount - kStep, kStep> others;

    __device__ __forceinline__ void feed(float* values) {
        *values = first.feed(*values);
        if constexpr (kSize > 1) others.feed(values + 1);
    }
};
template <int kCount, int kStep>
struct Sums<0, kCount, kStep> {};

// Gives kSize values back kDelay, kDelay + 1, ... calls later.
template <int kSize, int kDelay>
struct Late {
    float past[kDelay];
    Late<kSize - 1, kDelay + 1> others;

    __device__ __forceinline__ Late() {
#pragma unroll
        for (int i = 0; i < kDelay; ++i) past[i] = 0.f;
    }
    __device__ __forceinline__ void exchange(float* values) {
        const float value = *values;
        *values = past[kDelay - 1];
#pragma unroll
        for (int i = kDelay - 1; i > 0; --i) past[i] = past[i - 1];
        past[0] = value;
        if constexpr (kSize > 1) others.exchange(values + 1);
    }
};
template <int kDelay>
struct Late<0, kDelay> {};

// Sums over this lane and the count - 1 lanes after it.
__device__ __forceinline__ float sum_after(float value, int count) {
    float partial = value, total = 0.f;
    int at = 0;
#pragma unroll
    for (int bit = 0; bit < kLevels; ++bit) {
        if (count >> bit & 1) {
            total = at == 0 ? partial : total + __shfl_down_sync(0xffffffffu, partial, at);
            at += 1 << bit;
        }
        if (count >> (bit + 1)) partial += __shfl_down_sync(0xffffffffu, partial, 1 << bit);
    }
    return total;
}

// Its adjoint: over this lane and the count - 1 lanes before it, lane 31 before lane 0. Lanes from kColumns on must hold 0.
__device__ __forceinline__ float sum_before(float value, int count) {
    const int lane = threadIdx.x;
    float partial = value, total = 0.f;
    int at = 0;
#pragma unroll
    for (int bit = 0; bit < kLevels; ++bit) {
        if (count >> bit & 1) {
            total = at == 0 ? partial : total + __shfl_sync(0xffffffffu, partial, (lane - at) & 31);
            at += 1 << bit;
        }
        if (count >> (bit + 1)) partial += __shfl_sync(0xffffffffu, partial, (lane - (1 << bit)) & 31);
    }
    return total;
}

// The distances of offsets dy .. dy + kSize - 1 of one picture, line by line. kCut: how many rows of the first one's window fall
// outside the square (then one more of each following one's), 0 for none of any.
template <int kSize, int kCut>
struct Walker {
    static constexpr int kOutside = kCut == 0 ? 1 : kCut + kSize - 1;
    float moved[kSize][kChannels];              // I(x + d) of the kSize offsets; the first is read last time as the second
    Sums<kSize, kWindow - kCut, kCut == 0 ? 0 : 1> inside;
    Running<kWindow> energy;
    Late<kCut == 0 ? 0 : kSize, kCut> late;     // sums of D, until the window's last row is there
    float recent[kOutside];                     // E of the latest rows

    __device__ __forceinline__ Walker(const Picture& picture, const Lines& lines, int dy) {
#pragma unroll
        for (int k = 1; k < kSize; ++k) read(picture, lines.row(picture, dy + k - 1), lines.moved, moved[k]);
#pragma unroll
        for (int i = 0; i < kOutside; ++i) recent[i] = 0.f;
    }

    // Takes line j in; the distances of the pixels whose windows end there are right from j = 2 kHalf on.
    __device__ __forceinline__ void step(const Picture& picture, const Lines& lines, int dy, int j, float (&dist)[kSize]) {
        float base[kChannels], column[kSize];
        read(picture, lines.row(picture, j), lines.base, base);
#pragma unroll
        for (int k = 0; k + 1 < kSize; ++k)
#pragma unroll
            for (int c = 0; c < kChannels; ++c) moved[k][c] = moved[k + 1][c];
        read(picture, lines.row(picture, j + dy + kSize - 1), lines.moved, moved[kSize - 1]);
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
            float difference = moved[k][0] - base[0], square = difference * difference;
#pragma unroll
            for (int c = 1; c < kChannels; ++c) {
                difference = moved[k][c] - base[c];
                square = fmaf(difference, difference, square);
            }
            column[k] = square;
        }
        inside.feed(column);
        float side = 0.f;                       // the window's column of E, then its sum over the columns outside
        if (kCut > 0 || lines.cuts_columns()) {
            float square = base[0] * base[0];
#pragma unroll
            for (int c = 1; c < kChannels; ++c) square = fmaf(base[c], base[c], square);
            if constexpr (kCut > 0) add_rows_outside(square, column);
            if (lines.cuts_columns()) side = energy.feed(square);
        }
        if (j < 2 * kHalf) return;
        if (lines.cuts_columns()) {
            const float whole = side;
            side = 0.f;
            for (int i = lines.columns_inside; i < kWindow; ++i) side += __shfl_down_sync(0xffffffffu, whole, i);
#pragma unroll
            for (int k = 0; k < kSize; ++k) dist[k] = sum_after(column[k], lines.columns_inside) + side;
        } else {
#pragma unroll
            for (int k = 0; k < kSize; ++k) dist[k] = sum_after(column[k], kWindow);
        }
    }

    // The last kCut + k rows of the window are outside: there I(x + d) counts as 0, which leaves E.
    __device__ __forceinline__ void add_rows_outside(float square, float (&column)[kSize]) {
#pragma unroll
        for (int i = kOutside - 1; i > 0; --i) recent[i] = recent[i - 1];
        recent[0] = square;
        late.exchange(column);
        float outside = 0.f;
#pragma unroll
        for (int i = 0; i + 1 < kCut; ++i) outside += recent[i];
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
            outside += recent[kCut + k - 1];
            column[k] += outside;
        }
    }
};

// All offsets of one column and one vertical direction, in groups: pass.walk<size, cut>(lines, dy, valid), of which the first
// `valid` count.
template <class Pass>
__device__ void walk_column(Pass& pass, const Lines& lines) {
    if (lines.down > 0) pass.template walk<1, 0>(lines, 0, 1);
#pragma unroll 1
    for (int dy = 1; dy <= kWhole; dy += kGroup) pass.template walk<kGroup, 0>(lines, dy, min(kGroup, kWhole + 1 - dy));
    pass.template walk<kHalf < kGroup ? kHalf : kGroup, 1>(lines, kWhole + 1, kGroup);
    if constexpr (kHalf > kGroup) pass.template walk<kHalf - kGroup, 1 + kGroup>(lines, kWhole + 1 + kGroup, kGroup);
}

// Every splits-th column of offsets, from `split` on.
template <class Pass>
__device__ void walk_offsets(Pass& pass, const Picture& picture, int split, int splits) {
#pragma unroll 1
    for (int offset_x = split - kRadius; offset_x <= kRadius; offset_x += splits)
#pragma unroll 1
        for (int down = 1; down >= -1; down -= 2) {
            const Lines lines(picture, down, offset_x);
            walk_column(pass, lines);
            __syncwarp();                       // a tile turned over gives a cell to another lane
        }
}

// A sum of many floats that keeps what rounding takes from it (two-sum).
__device__ __forceinline__ void add_exactly(float& sum, float& rest, float value) {
    const float total = sum + value, back = total - sum;
    rest += (sum - (total - back)) + (value - back);
    sum = total;
}

#endif
