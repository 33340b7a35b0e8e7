//! What the processor offers this process: how many threads, which instructions. Knows no kernel.

/// Threads that this process may keep busy: the smallest of its CPU affinity mask and its cgroup
/// CPU quota (v1 and v2, rounded down), at least 1. Never the number of physical cores: a
/// container that computes on more threads than its quota is throttled in the middle of a step.
pub fn threads_available() -> usize {
    // The standard library reads sched_getaffinity and both cgroup hierarchies.
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Instruction sets that kernels exist for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Features {
    /// AVX2, FMA and F16C.
    pub avx2: bool,
    /// The same and AVX-VNNI.
    pub avx_vnni: bool,
    /// AVX-512 F, BW, VL and VNNI.
    pub avx512: bool,
    /// The same and AVX-512 BF16.
    pub bf16: bool,
}

impl Features {
    /// Asks the processor and the operating system.
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            let avx_vnni = avx2 && is_x86_feature_detected!("avxvnni");
            let avx512 = avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni");
            let bf16 = avx512 && is_x86_feature_detected!("avx512bf16");
            Self { avx2, avx_vnni, avx512, bf16 }
        }
        #[cfg(not(target_arch = "x86_64"))]
        Self::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn detection_is_consistent() {
        assert!(threads_available() >= 1);
        let features = Features::detect();
        assert!(features.avx2 || !features.avx512, "every AVX-512 chip has AVX2");
        assert!(features.avx2 || !features.avx_vnni);
        assert!(features.avx512 || !features.bf16);
        assert_eq!(features, Features::detect());
    }
}
