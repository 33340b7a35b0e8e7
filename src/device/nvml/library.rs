//! The management library by its C interface. Knows nothing of what its answers are for.

use nvml_wrapper::{Nvml, NvmlBuilder};

use super::{Meter, Reading};

/// Finds a device by its UUID in the library that `builder` finds.
pub(super) fn open(builder: NvmlBuilder<'_>, uuid: &str) -> Result<Meter, String> {
    let nvml = builder.init().map_err(|error| error.to_string())?;
    nvml.device_by_uuid(uuid).map_err(|error| error.to_string())?;
    let uuid = uuid.to_owned();
    Ok(Box::new(move || read(&nvml, &uuid)))
}

/// A MIG instance has memory of its own. Power and utilisation are the whole GPU's, and not its to
/// claim.
fn read(nvml: &Nvml, uuid: &str) -> Reading {
    let Ok(device) = nvml.device_by_uuid(uuid) else { return Reading::default() };
    let memory = device.memory_info().ok().map(|memory| [memory.used, memory.free]);
    if uuid.starts_with("MIG-") {
        return Reading { memory, ..Reading::default() };
    }
    Reading {
        utilization_percent: device.utilization_rates().ok().map(|rates| rates.gpu),
        memory,
        power_milliwatts: device.power_usage().ok(),
        energy_millijoules: device.total_energy_consumption().ok(),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::process::Command;

    use super::*;

    /// A library with one GPU and one instance on it, as the driver's header declares it.
    const LIBRARY: &str = r#"
        #include <string.h>
        typedef struct { unsigned int gpu, memory; } rates;
        typedef struct {
            unsigned int version;
            unsigned long long total, reserved, free, used;
        } bytes;
        static int whole, part;
        int nvmlInit_v2(void) { return 0; }
        int nvmlShutdown(void) { return 0; }
        const char *nvmlErrorString(int code) { return "an error"; }
        int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
            if (!strcmp(uuid, "GPU-1")) { *device = &whole; return 0; }
            if (!strcmp(uuid, "MIG-2")) { *device = &part; return 0; }
            return 6;
        }
        int nvmlDeviceGetUtilizationRates(void *device, rates *out) {
            if (device != &whole) return 3;
            out->gpu = 42; out->memory = 7; return 0;
        }
        int nvmlDeviceGetMemoryInfo_v2(void *device, bytes *out) {
            out->total = 80; out->reserved = 1;
            out->used = device == &whole ? 30 : 3; out->free = device == &whole ? 49 : 6;
            return 0;
        }
        int nvmlDeviceGetPowerUsage(void *device, unsigned int *out) { *out = 71500; return 0; }
        int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *out) {
            return 3;
        }
    "#;

    fn library(folder: &Path) -> std::path::PathBuf {
        let (source, library) = (folder.join("nvml.c"), folder.join("libnvml.so"));
        std::fs::write(&source, LIBRARY).unwrap();
        let mut compiler = Command::new("cc");
        let made = compiler.args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source).status();
        assert!(made.expect("a C compiler").success());
        library
    }

    #[test]
    fn a_gpu_says_what_it_can_and_an_instance_claims_no_meters() {
        let folder = tempfile::tempdir().unwrap();
        let library = library(folder.path());
        let open = |library: &Path, uuid: &str| {
            let mut builder = Nvml::builder();
            builder.lib_path(library.as_os_str());
            super::open(builder, uuid).map(|meter| meter())
        };
        let gpu = open(&library, "GPU-1").unwrap();
        let memory = Some([30, 49]);
        let expected = Reading {
            utilization_percent: Some(42),
            memory,
            power_milliwatts: Some(71_500),
            energy_millijoules: None,
        };
        assert_eq!(gpu, expected, "this one has no energy meter");
        let instance = open(&library, "MIG-2").unwrap();
        assert_eq!(instance, Reading { memory: Some([3, 6]), ..Reading::default() });
        assert!(open(&library, "GPU-9").is_err(), "not here");
        assert!(open("/no/such/library.so".as_ref(), "GPU-1").is_err());
    }
}
