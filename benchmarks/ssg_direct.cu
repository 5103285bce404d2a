// The direct formulation, written down as the definition reads: the baseline of the benchmark and a cross-check of the tests,
// never used for training. One thread per row and offset, window and channels read from global memory, every term of the
// gradient scattered with a float atomic (so its last bits change from run to run).
//
//   dist[n, d] = sum_{u, c} (Z_c(d + u) - P_c(p + u))^2     P: reflect-padded by r, Z: P inside the search square, 0 outside

extern "C" __global__ void ssg_direct(
    const float* padded,                // [B, C, H + 2 r, W + 2 r]
    const long long* pixels,            // [N]: (b H + y) W + x
    int row_count, int channels, int height, int width, int search, int window,
    float* distances                    // [N, search^2]
) {
    const long long index = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= (long long)row_count * search * search) return;
    const int radius = search / 2, half = window / 2, full_h = height + 2 * radius, full_w = width + 2 * radius;
    const int d = (int)(index % (search * search)), dy = d / search - radius, dx = d % search - radius;
    const long long pixel = pixels[index / (search * search)];
    const int x = (int)(pixel % width) + radius, y = (int)(pixel / width % height) + radius;
    float sum = 0.f;
    for (int c = 0; c < channels; ++c) {
        const float* plane = padded + (pixel / width / height * channels + c) * full_h * full_w;
        for (int uy = -half; uy <= half; ++uy)
            for (int ux = -half; ux <= half; ++ux) {
                const bool inside = abs(dy + uy) <= radius && abs(dx + ux) <= radius;
                const float z = inside ? plane[(long long)(y + dy + uy) * full_w + x + dx + ux] : 0.f;
                const float difference = z - plane[(long long)(y + uy) * full_w + x + ux];
                sum += difference * difference;
            }
    }
    distances[index] = sum;
}

extern "C" __global__ void ssg_direct_backward(
    const float* padded,
    const long long* pixels,
    const float* slopes,                // [N, search^2]: dL/d dist
    int row_count, int channels, int height, int width, int search, int window,
    float* gradient                     // [B, C, H + 2 r, W + 2 r], zero at the start
) {
    const long long index = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= (long long)row_count * search * search) return;
    const int radius = search / 2, half = window / 2, full_h = height + 2 * radius, full_w = width + 2 * radius;
    const int d = (int)(index % (search * search)), dy = d / search - radius, dx = d % search - radius;
    const long long pixel = pixels[index / (search * search)];
    const int x = (int)(pixel % width) + radius, y = (int)(pixel / width % height) + radius;
    const float slope = slopes[index];
    for (int c = 0; c < channels; ++c) {
        const long long plane = (pixel / width / height * channels + c) * full_h * full_w;
        for (int uy = -half; uy <= half; ++uy)
            for (int ux = -half; ux <= half; ++ux) {
                const bool inside = abs(dy + uy) <= radius && abs(dx + ux) <= radius;
                const long long here = plane + (long long)(y + uy) * full_w + x + ux, there = here + (long long)dy * full_w + dx;
                const float pull = 2.f * slope * ((inside ? padded[there] : 0.f) - padded[here]);
                if (inside) atomicAdd(gradient + there, pull);
                atomicAdd(gradient + here, -pull);
            }
    }
}
