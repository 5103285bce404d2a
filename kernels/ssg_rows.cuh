// One block works on one row of the self-similarity graph (one masked pixel p) at a time.
//
//   dist(p, d) = sum_u |Z(d + u) - I(p + u)|^2      u in the window around 0, d in the search square around 0
//
// Z is the search square cut out around p and continued with zeros: that is the published definition, and it makes every
// offset d the same sum. The square lies in shared memory with `window / 2` zeros around it. A thread owns SSG_RUN
// neighbouring offsets of one line: it reads a line of the square once and uses each value for all of them.
//
//   dL/dZ(y) = 2 [ Z(y) sum_u A(y - u) - sum_u A(y - u) I(p + u) ]           A = dL/d dist, zero outside the square
//   dL/dI(p + u) = 2 [ I(p + u) sum_d A(d) - sum_d A(d) Z(d + u) ]
//
// No float is ever added in an order that depends on scheduling: sums within a block are taken in a fixed order, and a
// block adds the gradients of its tile's pixels one after the other to a slot that is its own (see ssg_gather.cu).
//
// The host chooses the SSG_* numbers (ops/ssg_cuda_launch.py) and compiles once for each set.
#ifndef SSG_ROWS_CUH
#define SSG_ROWS_CUH

#include "ssg_entries.cuh"

constexpr int kPatch = kSearch + kWindow - 1;   // side of the square with its zeros
constexpr int kGroup = SSG_GROUP;               // channels in shared memory at a time
constexpr int kRun = SSG_RUN;                   // offsets of a thread
constexpr int kThreads = SSG_THREADS;
constexpr int kWarps = kThreads / 32;
constexpr int kStride = SSG_STRIDE;             // words from line to line, chosen so that a warp meets no bank twice
constexpr int kPlane = SSG_PLANE;               // words from channel to channel
constexpr int kSplits = SSG_SPLITS;             // threads that share one line of the window's gradient
constexpr int kRuns = (kSearch + kRun - 1) / kRun;
constexpr int kItems = kSearch * kRuns;
constexpr int kRounds = (kItems + kThreads - 1) / kThreads;
constexpr int kQuads = (kWindow + 3) / 4;
constexpr int kTileWords = 8;                   // a tile has at most 256 pixels

struct __align__(16) Shared {
    float4 window[kGroup][kWindow][kQuads];     // I(p + u)
    double total[4];
    float patch[kGroup * kPlane];               // Z
    float slope[kPatch * kStride];              // A, with zeros around it
    float share[kSplits][kGroup][kWindow][kWindow];
    float lane[3][kThreads];
    float row[8];
    unsigned selected[kTileWords];
};
static_assert(sizeof(Shared) == SSG_SHARED_BYTES, "the host's count of shared memory is another one");
static_assert(kStride >= kRuns * kRun + kWindow - 1, "a line's last run would read past its end");

extern __shared__ float4 shared_memory[];

// Thread -> offsets. Lines run fastest: with kStride * kSearch = kRun (mod 32), neighbouring threads read neighbouring banks.
__device__ __forceinline__ int run_line(int item) { return item % kSearch; }
__device__ __forceinline__ int run_start(int item) { return item / kSearch * kRun; }
__device__ __forceinline__ bool is_offset(int item, int v) { return item < kItems && run_start(item) + v < kSearch; }

__device__ void clear_shared(Shared& s) {
    for (int i = threadIdx.x; i < kGroup * kPlane; i += kThreads) s.patch[i] = 0.f;
    for (int i = threadIdx.x; i < kPatch * kStride; i += kThreads) s.slope[i] = 0.f;
    __syncthreads();
}

// The tile's masked pixels as bits, in raster order; every thread learns how many.
__device__ int select_pixels(Shared& s, const unsigned char* mask, int height, int width, int y0, int x0, int tile_h, int tile_w) {
    for (int i = threadIdx.x; i < kTileWords * 32; i += kThreads) {
        const int y = y0 + i / tile_w, x = x0 + i % tile_w;
        const bool chosen = i < tile_h * tile_w && y < height && x < width && mask[(size_t)y * width + x] != 0;
        const unsigned bits = __ballot_sync(0xffffffffu, chosen);
        if (i % 32 == 0) s.selected[i / 32] = bits;
    }
    __syncthreads();
    int count = 0;
    for (int i = 0; i < kTileWords; ++i) count += __popc(s.selected[i]);
    return count;
}

// Channels c0 .. c0 + kGroup of the square around (y, x), reflected at the border; channels that do not exist are 0.
__device__ void load_square(Shared& s, const float* __restrict__ image, int channels, int c0, int height, int width, int y, int x) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 2
    for (int line = warp; line < kGroup * kSearch; line += kWarps) {
        const int c = line / kSearch, iy = line % kSearch, uy = iy - (kRadius - kHalf);
        const bool exists = c0 + c < channels;
        const float* from = image + ((size_t)(exists ? c0 + c : 0) * height + reflect(y + iy - kRadius, height)) * width;
        float* to = s.patch + c * kPlane + (iy + kHalf) * kStride + kHalf;
        for (int ix = lane; ix < kSearch; ix += 32) {
            const float value = exists ? from[reflect(x + ix - kRadius, width)] : 0.f;
            const int ux = ix - (kRadius - kHalf);
            to[ix] = value;
            if (uy >= 0 && uy < kWindow && ux >= 0 && ux < kWindow) reinterpret_cast<float*>(s.window[c][uy])[ux] = value;
        }
    }
    __syncthreads();
}

// Adds this group's share to the distances of the thread's offsets. Both images go through this one function, operation by
// operation (fmaf leaves the compiler nothing to contract), so that equal images give equal bits.
__device__ __forceinline__ void add_distances(const Shared& s, float (&dist)[kRounds][kRun]) {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
        const int item = threadIdx.x + round * kThreads;
        if (item >= kItems) break;
#pragma unroll 1
        for (int c = 0; c < kGroup; ++c) {
            const float* corner = s.patch + c * kPlane + run_line(item) * kStride + run_start(item);
            float sum[kRun];    // of this channel: shorter chains of additions round less
#pragma unroll
            for (int v = 0; v < kRun; ++v) sum[v] = 0.f;
#pragma unroll 1
            for (int uy = 0; uy < kWindow; ++uy) {
                float z[kRun + kWindow - 1];
#pragma unroll
                for (int i = 0; i < kRun + kWindow - 1; ++i) z[i] = corner[uy * kStride + i];
#pragma unroll
                for (int quad = 0; quad < kQuads; ++quad) {
                    const float4 four = s.window[c][uy][quad];
                    const float centre[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int ux = 4 * quad + i;
                        if (ux >= kWindow) break;
#pragma unroll
                        for (int v = 0; v < kRun; ++v) {
                            const float difference = z[v + ux] - centre[i];
                            sum[v] = fmaf(difference, difference, sum[v]);
                        }
                    }
                }
            }
#pragma unroll
            for (int v = 0; v < kRun; ++v) dist[round][v] += sum[v];
        }
    }
}

// The distances of all channels. With one group, the square stays in shared memory for the backward pass.
__device__ void row_distances(
    Shared& s, const float* image, int channels, int height, int width, int y, int x, float (&dist)[kRounds][kRun]) {
#pragma unroll
    for (int round = 0; round < kRounds; ++round)
#pragma unroll
        for (int v = 0; v < kRun; ++v) dist[round][v] = 0.f;
    for (int c0 = 0; c0 < channels; c0 += kGroup) {
        load_square(s, image, channels, c0, height, width, y, x);
        add_distances(s, dist);
        __syncthreads();
    }
}

// Sums each value over the block, in double and in a fixed order; s.total holds the sums for every thread afterwards.
template <int count>
__device__ void block_sum(Shared& s, const float (&value)[count]) {
#pragma unroll
    for (int j = 0; j < count; ++j) s.lane[j][threadIdx.x] = value[j];
    __syncthreads();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int j = warp; j < count; j += kWarps) {
        double sum = 0.;
        for (int i = lane; i < kThreads; i += 32) sum += s.lane[j][i];
        for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(0xffffffffu, sum, step);
        if (lane == 0) s.total[j] = sum;
    }
    __syncthreads();
}

// box[v] += a[v] + ... + a[v + kWindow - 1]; the values that all runs share are summed once.
__device__ __forceinline__ void add_window_sums(const float (&a)[kRun + kWindow - 1], float (&box)[kRun]) {
    constexpr int first = kRun <= kWindow ? kRun - 1 : 0, last = kRun <= kWindow ? kWindow : 0;
    float common = 0.f;
#pragma unroll
    for (int i = first; i < last; ++i) common += a[i];
#pragma unroll
    for (int v = 0; v < kRun; ++v) {
        float sum = common;
#pragma unroll
        for (int i = v; i < v + kWindow; ++i)
            if (i < first || i >= last) sum += a[i];
        box[v] += sum;
    }
}

// Turns the squares in shared memory into dL/dZ, with dL/dI(p + u) added in the middle. Needs s.slope and its sum.
__device__ void differentiate_square(Shared& s, float slope_sum) {
    for (int item = threadIdx.x; item < kSplits * kGroup * kWindow; item += kThreads) {
        const int uy = item % kWindow, c = item / kWindow % kGroup, split = item / (kWindow * kGroup);
        float sum[kWindow];
#pragma unroll
        for (int ux = 0; ux < kWindow; ++ux) sum[ux] = 0.f;
#pragma unroll 1
        for (int dy = split; dy < kSearch; dy += kSplits) {
            const float* a = s.slope + (dy + kHalf) * kStride + kHalf;
            const float* z = s.patch + c * kPlane + (dy + uy) * kStride;
#pragma unroll
            for (int dx = 0; dx < kSearch; ++dx)
#pragma unroll
                for (int ux = 0; ux < kWindow; ++ux) sum[ux] = fmaf(a[dx], z[dx + ux], sum[ux]);
        }
#pragma unroll
        for (int ux = 0; ux < kWindow; ++ux) s.share[split][c][uy][ux] = sum[ux];
    }
    __syncthreads();
#pragma unroll 1
    for (int item = threadIdx.x; item < kItems; item += kThreads) {
        const int iy = run_line(item), ix = run_start(item);
        float box[kRun], sum[kGroup][kRun];
#pragma unroll
        for (int v = 0; v < kRun; ++v) {
            box[v] = 0.f;
#pragma unroll
            for (int c = 0; c < kGroup; ++c) sum[c][v] = 0.f;
        }
#pragma unroll 1
        for (int ty = 0; ty < kWindow; ++ty) {      // A(y - u) for u = kHalf - (ty, tx): the window is read backwards
            float a[kRun + kWindow - 1];
#pragma unroll
            for (int i = 0; i < kRun + kWindow - 1; ++i) a[i] = s.slope[(iy + ty) * kStride + ix + i];
            add_window_sums(a, box);
#pragma unroll
            for (int c = 0; c < kGroup; ++c)
#pragma unroll
                for (int quad = 0; quad < kQuads; ++quad) {
                    const float4 four = s.window[c][kWindow - 1 - ty][quad];
                    const float centre[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int ux = 4 * quad + i;
                        if (ux >= kWindow) break;
#pragma unroll
                        for (int v = 0; v < kRun; ++v) sum[c][v] = fmaf(a[v + kWindow - 1 - ux], centre[i], sum[c][v]);
                    }
                }
        }
#pragma unroll
        for (int c = 0; c < kGroup; ++c)
#pragma unroll
            for (int v = 0; v < kRun; ++v) {
                if (ix + v >= kSearch) break;
                float& here = s.patch[c * kPlane + (iy + kHalf) * kStride + ix + v + kHalf];
                const int uy = iy - (kRadius - kHalf), ux = ix + v - (kRadius - kHalf);
                float gradient = here * box[v] - sum[c][v];
                if (uy >= 0 && uy < kWindow && ux >= 0 && ux < kWindow) {
                    float centre_sum = 0.f;
                    for (int split = 0; split < kSplits; ++split) centre_sum += s.share[split][c][uy][ux];
                    gradient += here * slope_sum - centre_sum;
                }
                here = 2.f * gradient;
            }
    }
    __syncthreads();
}

// Adds the gradient of one pixel's square to the tile's slot [channels, tile_h + 2 r, tile_w + 2 r]; (ty, tx) is p in the tile.
// `loaded`: the square of all channels is in shared memory already.
__device__ void add_gradient(
    Shared& s, bool loaded, const float* image, int channels, int height, int width, int y, int x, float slope_sum, float* slot,
    int slot_h, int slot_w, int ty, int tx) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int c0 = 0; c0 < channels; c0 += kGroup) {
        if (!loaded) load_square(s, image, channels, c0, height, width, y, x);
        differentiate_square(s, slope_sum);
        for (int line = warp; line < kGroup * kSearch; line += kWarps) {
            const int c = line / kSearch, iy = line % kSearch;
            if (c0 + c >= channels) break;
            const float* from = s.patch + c * kPlane + (iy + kHalf) * kStride + kHalf;
            float* to = slot + ((size_t)(c0 + c) * slot_h + ty + iy) * slot_w + tx;
            for (int ix = lane; ix < kSearch; ix += 32) to[ix] += from[ix];
        }
        __syncthreads();
    }
}

#endif
