// The graph's sizes, and one entry of the loss, whichever way its distances were found.
//
//   T = s / Z, s = exp(-dist / kappa), Z = sum_d s (1 when un-normalised)    a = max(T_sr, 1e-10), b = max(T_gt, 1e-10)
//   L1 = sum |T_sr - T_gt|          KL = sum b (ln b - ln a)          (means are taken by the host)
//   G = w_L1 sign(T_sr - T_gt) - w_KL (b / a) [T_sr >= 1e-10]         q = sum_d G T_sr (0 when un-normalised)
//   A = dL/d dist = -(1 / kappa) T_sr (G - q)
//
// T_sr G is formed as w_L1 sign T_sr - w_KL b, because T_sr b / a = b wherever the clamp lets a gradient pass.
#ifndef SSG_ENTRIES_CUH
#define SSG_ENTRIES_CUH

constexpr int kSearch = SSG_SEARCH;
constexpr int kWindow = SSG_WINDOW;
constexpr int kRadius = kSearch / 2;
constexpr int kHalf = kWindow / 2;
constexpr float kClamp = 1e-10f;
constexpr float kLogClamp = -23.025850929940457f;

__device__ __forceinline__ int reflect(int i, int n) {
    i = i < 0 ? -i : i;
    return i < n ? i : 2 * (n - 1) - i;
}

struct RowScale {
    float inverse_sr, inverse_gt, log_sr, log_gt, log_ratio;    // 1 / Z, ln Z and ln(Z_sr / Z_gt)
};

// Of the sums of s over a row. The logarithm of the ratio is taken from the double sums: it is an error common to the whole row,
// and where the images almost agree KL is of second order while this term is of first.
__device__ __forceinline__ RowScale row_scale(double sum_sr, double sum_gt, bool normalize) {
    const double z_sr = normalize ? sum_sr + 1e-10 : 1., z_gt = normalize ? sum_gt + 1e-10 : 1.;
    return {(float)(1. / z_sr), (float)(1. / z_gt), logf((float)z_sr), logf((float)z_gt), log1pf((float)((z_sr - z_gt) / z_gt))};
}

struct Entry {
    float l1, kl, weighted;     // the last is T_sr G
};

__device__ __forceinline__ Entry compare(float e_sr, float e_gt, const RowScale& z, float l1_weight, float kl_weight, float& t_sr) {
    // __fmul_rn: contracted into the difference below, equal images would no longer cancel
    t_sr = __fmul_rn(expf(-e_sr), z.inverse_sr);
    const float t_gt = __fmul_rn(expf(-e_gt), z.inverse_gt);
    const bool live_sr = t_sr >= kClamp, live_gt = t_gt >= kClamp;
    const float b = live_gt ? t_gt : kClamp;
    const float log_a = live_sr ? -e_sr - z.log_sr : kLogClamp, log_b = live_gt ? -e_gt - z.log_gt : kLogClamp;
    const float difference = t_sr - t_gt;
    const float sign = (difference > 0.f ? 1.f : 0.f) - (difference < 0.f ? 1.f : 0.f);
    Entry entry;
    entry.l1 = fabsf(difference);
    entry.kl = b * (live_sr && live_gt ? (e_sr - e_gt) + z.log_ratio : log_b - log_a);
    entry.weighted = l1_weight * sign * t_sr - (live_sr ? kl_weight * b : 0.f);
    return entry;
}

#endif
