//! `sconce plan`: from "these models" to the right GPU or slice, its pods, their thresholds and the
//! bill, by arithmetic on headers and shapes. Opens no device and loads no weights.

mod calibrate;
mod choose;
mod command;
mod compare;
mod devices;
mod fit;
mod kustomize;
mod load;
mod model;
mod pod;
mod probe;
mod report;
mod shape;
mod source;
mod speed;
mod table;
#[cfg(test)]
mod tests;
mod unfit;

use std::io::Write;
use std::path::PathBuf;

use crate::config::Config;
use crate::config::values;
use choose::Terms;
use devices::{Device, Table};
use fit::{Room, Wanted};
use model::Model;
use pod::ByHand;
use probe::Target;
use report::Report;

/// What the command was asked.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Args {
    /// Manifests by name; weight files, here or elsewhere (hub:, https://), of which only headers
    /// are read; folders; shapes (.toml, config.json, shape:NAME@DTYPE); all manifests by default
    pub models: Vec<String>,

    /// Chips (l4), instance types (g6.xlarge), MIG slices (mig:1g.10gb@a100-80) or cpu to choose
    /// from; every whole one that is known if none is given
    #[arg(long = "device", value_name = "NAME")]
    pub devices: Vec<String>,

    /// Files that add chips, slices, machines, prices and assumptions
    #[arg(short = 'f', long = "devices-file", value_name = "FILE")]
    pub files: Vec<PathBuf>,

    /// Load of a model: MODEL:rps=2,prompt=500,output=200,latency=10,context=4096 (any of these)
    #[arg(long = "load", value_name = "LOAD")]
    pub loads: Vec<String>,

    /// Format of shapes that name none [default: what the shape says, else bf16]
    #[arg(long, value_name = "DTYPE")]
    pub dtype: Option<String>,

    /// Plan for spot: one replica more, and spot prices
    #[arg(long)]
    pub spot: bool,

    /// What spot is cheaper by, as 0.6, for machines without a spot price of their own
    #[arg(long, value_name = "PART")]
    pub spot_discount: Option<f64>,

    /// Pods that take turns on each GPU
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub time_slicing: u32,

    /// Keep all models on one device, even where two are cheaper
    #[arg(long)]
    pub together: bool,

    /// CPU that daemonsets take of each node
    #[arg(long, value_name = "MILLICORES", default_value_t = 200)]
    pub daemonset_cpu: u32,

    /// Memory that daemonsets take of each node
    #[arg(long, value_name = "BYTES", default_value = "512MiB")]
    pub daemonset_memory: String,

    /// Ephemeral storage of a node [default: what a 20 GiB root volume leaves]
    #[arg(long, value_name = "BYTES")]
    pub node_storage: Option<String>,

    /// KV region [default: all that is left of a GPU, 512 MiB on a CPU]
    #[arg(long, value_name = "BYTES")]
    pub kv: Option<String>,

    /// CPU request, instead of the computed one
    #[arg(long, value_name = "MILLICORES")]
    pub cpu: Option<u32>,

    /// Memory request and limit, instead of the computed one
    #[arg(long, value_name = "BYTES")]
    pub memory: Option<String>,

    /// Ephemeral storage of the pod, instead of the computed one; 0 for none
    #[arg(long, value_name = "BYTES")]
    pub storage: Option<String>,

    /// Grace period [default: the shortest of 15, 30 and 110 in which an answer finishes]
    #[arg(long, value_name = "SECONDS")]
    pub grace: Option<u32>,

    /// Most replicas [default: twice the planned ones]
    #[arg(long, value_name = "N")]
    pub max_replicas: Option<u32>,

    /// Requests in flight that keep the objective, if they were measured before
    #[arg(long, value_name = "N")]
    pub concurrency: Option<f64>,

    /// Measure that on a running server (http://HOST:PORT) under load; objectives are --load's,
    /// else the manifests'
    #[arg(long, value_name = "URL", conflicts_with = "concurrency")]
    pub calibrate: Option<String>,

    /// Most streams, and most seconds, of --calibrate
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub calibrate_streams: usize,

    /// See --calibrate-streams
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    pub calibrate_seconds: u64,

    /// Compare with a running server by its admin port (http://HOST:PORT)
    #[arg(long, value_name = "URL")]
    pub from: Option<String>,

    /// Seconds to look for peaks there
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    pub watch: u64,

    /// table, json or kustomize (an overlay of k8s/base that deploys the plan)
    #[arg(short = 'o', long, value_name = "FORMAT", default_value = "table")]
    pub output: String,

    /// Folder of the overlay
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,

    /// Way from the overlay to the base; components lie beside it
    #[arg(long, value_name = "PATH", default_value = "../../base")]
    pub base: String,

    /// Components of the overlay, beside its scaler, monitoring and spot: karpenter, gke, ...
    #[arg(long = "component", value_name = "NAME")]
    pub components: Vec<String>,

    /// Image of the overlay, as REGISTRY/sconce:TAG or REGISTRY/sconce@sha256:DIGEST
    #[arg(long, value_name = "IMAGE")]
    pub image: Option<String>,
}

/// Why there is no plan.
#[derive(Debug)]
pub struct PlanError {
    fault: Fault,
    message: String,
}

/// Whose fault it is that there is no plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The command line.
    Usage,
    /// A file's content.
    Data,
    /// A file is not there.
    Input,
    /// A server does not answer, or standard output is gone.
    Unavailable,
    /// Nothing that was allowed is large or fast enough.
    Fit,
}

impl PlanError {
    fn new(fault: Fault, message: impl Into<String>) -> Self {
        Self { fault, message: message.into() }
    }

    /// From sysexits.h; 2 where the models do not fit.
    pub fn exit_code(&self) -> u8 {
        match self.fault {
            Fault::Usage => 64,
            Fault::Data => 65,
            Fault::Input => 66,
            Fault::Unavailable => 69,
            Fault::Fit => 2,
        }
    }
}

impl std::fmt::Display for PlanError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.message)
    }
}

/// Plans and writes the result to `out`.
///
/// # Errors
/// Input that cannot be used, or models that fit on nothing that was allowed.
pub fn run(config: &Config, args: &Args, out: &mut dyn Write) -> Result<(), PlanError> {
    let table = Table::read(&args.files, discount(args)?)?;
    let assumed = table.assumptions()?;
    let models = Model::all(config, &args.models, args.dtype.as_deref())?;
    if models.is_empty() {
        return Err(PlanError::new(Fault::Usage, "no model to plan for"));
    }
    let (loads, mut notes) = load::complete(&models, &args.loads, &assumed)?;
    let mut terms = terms(args, assumed)?;
    let wanted: Vec<Wanted<'_>> =
        models.iter().zip(&loads).map(|(model, load)| Wanted { model, load: *load }).collect();
    if !(1..=64).contains(&args.time_slicing) {
        return Err(PlanError::new(Fault::Usage, "--time-slicing is from 1 to 64"));
    }
    let devices = table.devices(&args.devices, args.time_slicing)?;
    if args.spot && devices.iter().all(|device| device.hourly(true).is_none()) {
        let message = "--spot: no spot price is known; give --spot-discount, or \
                       spot_usd_per_hour in a file of -f";
        return Err(PlanError::new(Fault::Usage, message));
    }
    if let Some(measured) = measure(args, &wanted)? {
        terms.by_hand.concurrency = measured.concurrency.map(|streams| streams as f64);
        notes.extend(measured.notes);
    }
    let overlay = args.output == "kustomize";
    let Some(groups) = choose::group(&wanted, &devices, &terms, args.together || overlay) else {
        return Err(unfit::explain(&wanted, &devices, &table, &terms));
    };
    let mut report = Report::of(&wanted, groups, &devices, &terms, notes);
    if loads.iter().all(|load| load.rps == 0.0) {
        report.notes.push(
            "no load is known, so one replica and thresholds by memory alone: --load \
             MODEL:rps=1,prompt=500,output=200,latency=10 plans for an objective"
                .into(),
        );
    }
    if args.devices.is_empty() {
        report.add_slices(&wanted, &table.all_slices(), &terms);
    }
    if let Some(url) = &args.from {
        let target = Target::parse("--from", url)?;
        let watched = probe::wait(compare::watch(&target, args.watch.min(3600)))?;
        report.observed = report.groups.iter().flat_map(|it| watched.against(it)).collect();
    }
    let text = match args.output.as_str() {
        "table" => table::render(&report),
        "json" => report.to_json(),
        "kustomize" => write_overlay(&report, &models, args, &devices)?,
        other => {
            let message = format!("-o {other:?}: must be table, json or kustomize");
            return Err(PlanError::new(Fault::Usage, message));
        }
    };
    // Nobody reads a closed pipe.
    let _ = out.write_all(text.as_bytes());
    let _ = out.flush();
    Ok(())
}

/// What a running server can hold within the objectives, where one is named.
fn measure(args: &Args, wanted: &[Wanted<'_>]) -> Result<Option<calibrate::Measured>, PlanError> {
    let Some(url) = &args.calibrate else { return Ok(None) };
    let target = Target::parse("--calibrate", url)?;
    let bounds = calibrate::Bounds {
        streams: args.calibrate_streams.clamp(1, 1024),
        total: std::time::Duration::from_secs(args.calibrate_seconds.clamp(1, 3600)),
    };
    let measured = probe::wait(calibrate::run(&target, wanted, bounds))?;
    if measured.concurrency.is_none() {
        let levels = measured.notes.join("\n  ");
        let message = format!("--calibrate: not even one request at a time keeps it\n  {levels}");
        return Err(PlanError::new(Fault::Fit, message));
    }
    Ok(Some(measured))
}

/// Writes the overlay and says which files.
fn write_overlay(
    report: &Report,
    models: &[Model],
    args: &Args,
    devices: &[Device],
) -> Result<String, PlanError> {
    let Some(folder) = &args.out else {
        return Err(PlanError::new(Fault::Usage, "-o kustomize needs --out DIR"));
    };
    let site = kustomize::Site {
        base: &args.base,
        components: &args.components,
        image: args.image.as_deref(),
        command: &command::line(args),
        spot: args.spot,
        devices,
    };
    let files = kustomize::render(report, models, &site)?;
    kustomize::write(folder, &files)?;
    Ok(files.iter().map(|(name, _)| format!("{}\n", folder.join(name).display())).collect())
}

fn discount(args: &Args) -> Result<Option<f64>, PlanError> {
    match args.spot_discount {
        Some(part) if !(0.0..1.0).contains(&part) => {
            Err(PlanError::new(Fault::Usage, "--spot-discount is from 0 to below 1, as 0.6"))
        }
        other => Ok(other),
    }
}

fn terms(args: &Args, assumed: devices::Assumptions) -> Result<Terms, PlanError> {
    let size = |flag: &str, text: &str| {
        values::size(text, 0..=1 << 50).map_err(|allowed| {
            PlanError::new(Fault::Usage, format!("{flag} {text:?}: must be {allowed}"))
        })
    };
    let maybe = |flag: &str, text: &Option<String>| {
        text.as_deref().map(|text| size(flag, text)).transpose()
    };
    if args.concurrency.is_some_and(|n| !(1.0..=1e6).contains(&n)) {
        return Err(PlanError::new(Fault::Usage, "--concurrency is from 1 to 1000000"));
    }
    Ok(Terms {
        room: Room {
            assumed,
            daemonset_cpu_m: args.daemonset_cpu,
            daemonset_bytes: size("--daemonset-memory", &args.daemonset_memory)?,
            kv_bytes: maybe("--kv", &args.kv)?,
            storage_bytes: maybe("--node-storage", &args.node_storage)?,
        },
        by_hand: ByHand {
            cpu_m: args.cpu,
            memory: maybe("--memory", &args.memory)?,
            storage: maybe("--storage", &args.storage)?,
            grace_seconds: args.grace.map(|grace| grace.clamp(1, 86_400)),
            concurrency: args.concurrency,
            replicas_max: args.max_replicas,
        },
        spot: args.spot,
    })
}
