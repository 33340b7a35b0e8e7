//! Samples what the GPU's driver says of it, on a thread of its own: asking takes milliseconds,
//! which the engine does not have.

use std::sync::Arc;
use std::time::Duration;

use crate::device::cuda::GpuInfo;
use crate::device::nvml::{self, Reading};
use crate::telemetry::Telemetry;
use crate::telemetry::board::DeviceReading;

/// How often it is asked: scrapes come every 10 to 30 seconds.
const EVERY: Duration = Duration::from_secs(5);

/// Says which GPU it is, and from now on how it is.
///
/// # Errors
/// The system refuses a thread.
pub fn watch(info: &GpuInfo, telemetry: Arc<Telemetry>) -> std::io::Result<()> {
    telemetry.device_opened(&info.name, &info.uuid, info.mig().unwrap_or_default());
    let uuid = info.uuid.clone();
    let sample = move || match nvml::open(&uuid) {
        Ok(meter) => loop {
            telemetry.device_read(shown(meter()));
            std::thread::sleep(EVERY);
        },
        Err(reason) => tracing::info!(uuid, reason, "no NVML, no metrics of power and energy"),
    };
    std::thread::Builder::new().name("board".to_owned()).spawn(sample).map(drop)
}

/// In the units of metrics.
fn shown(reading: Reading) -> DeviceReading {
    DeviceReading {
        utilization: reading.utilization_percent.map(|percent| f64::from(percent) / 100.0),
        memory: reading.memory,
        power_watts: reading.power_milliwatts.map(|milliwatts| f64::from(milliwatts) / 1e3),
        energy_joules: reading.energy_millijoules.map(|millijoules| millijoules as f64 / 1e3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_have_base_units() {
        let reading = Reading {
            utilization_percent: Some(42),
            memory: Some([1, 2]),
            power_milliwatts: Some(71_500),
            energy_millijoules: Some(2_500),
        };
        let expected = DeviceReading {
            utilization: Some(0.42),
            memory: Some([1, 2]),
            power_watts: Some(71.5),
            energy_joules: Some(2.5),
        };
        assert_eq!(shown(reading), expected);
        assert_eq!(shown(Reading::default()), DeviceReading::default());
    }
}
