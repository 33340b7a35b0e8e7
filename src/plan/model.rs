//! What is to be planned for: manifests, weight files read by their headers only, and bare shapes.
//! Knows nothing of devices.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value as Json;

use super::shape::Shape;
use super::source::{Source, unreadable};
use super::{Fault, PlanError};
use crate::arch::{self, Description};
use crate::config::Config;
use crate::config::manifest::{Manifest, ManifestFile, text as manifest_text};
use crate::config::values::nearest;
use crate::engine::budget::{self, Wish};
use crate::kernels::builder::Capacity;
use crate::kernels::coarse::Coarse;
use crate::kernels::packed::PackedFormat;
use crate::store::fetch::present;
use crate::store::gguf::{self, GgmlType, Header};
use crate::store::safetensors::{self, DType};
use crate::weights::packed_format;

const SHAPES: &str = include_str!("shapes.toml");

/// A model to plan for.
#[derive(Debug, Clone)]
pub(super) struct Model {
    pub(super) name: String,
    /// `generate`, `embed` or `score`.
    pub(super) task: &'static str,
    /// Where its numbers come from.
    pub(super) from: &'static str,
    pub(super) shape: Shape,
    pub(super) weights: WeightBytes,
    /// Longest sequence that the manifest allows.
    pub(super) context: Option<u32>,
    pub(super) seats: Option<u32>,
    /// The manifest's objective.
    pub(super) latency_seconds: Option<f64>,
    /// Its manifest as text, where it has one.
    pub(super) manifest: Option<String>,
    /// Why this version would not serve it.
    pub(super) refused: Option<String>,
}

/// What weights take, in bytes.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct WeightBytes {
    pub(super) params: u64,
    /// Of `params`: those in layers, and in the head of a generator.
    pub(super) layer_params: u64,
    pub(super) head_params: u64,
    /// In the format of the file, as a GPU keeps them.
    pub(super) total: u64,
    pub(super) layers: u64,
    pub(super) head: u64,
    /// The largest tensor: it passes through host memory whole.
    pub(super) largest: u64,
    /// As a CPU keeps them, packed for its kernels.
    pub(super) cpu: u64,
    /// What a CPU keeps besides: a generator's head once more, for greedy steps.
    pub(super) coarse: u64,
    /// Formats by name, the largest part first.
    pub(super) formats: Vec<&'static str>,
    /// Matrices are quantised: their inputs are too.
    pub(super) quantised: bool,
}

/// One tensor, whatever the file.
struct Tensor {
    name: String,
    rows: u64,
    columns: u64,
    kind: GgmlType,
    bytes: u64,
}

/// What a weight file's header says.
enum WeightHeader {
    Gguf(Box<Header>),
    Safetensors(Vec<Tensor>),
}

impl WeightHeader {
    fn read(source: Source) -> Result<Self, PlanError> {
        let wrong = |what: String| PlanError::new(Fault::Data, format!("{}: {what}", source.name));
        let gguf = source.is_gguf();
        let start = std::io::BufReader::with_capacity(1 << 16, source.start);
        if gguf {
            let header =
                gguf::parse(start, source.bytes).map_err(|error| wrong(error.to_string()))?;
            return Ok(Self::Gguf(Box::new(header)));
        }
        let table =
            safetensors::parse(start, source.bytes).map_err(|error| wrong(error.to_string()))?;
        let tensors = table.into_values().map(|tensor| {
            let kind = match &tensor.dtype {
                DType::F32 => GgmlType::F32,
                DType::F16 => GgmlType::F16,
                DType::BF16 => GgmlType::BF16,
                // Position numbers and the like: no weights, and small.
                DType::I64 => return Ok(None),
                DType::Other(name) => {
                    let tensor = &tensor.name;
                    return Err(wrong(format!("tensor {tensor} has format {name}")));
                }
            };
            Ok(Some(Tensor::new(tensor.name, &tensor.shape, kind, tensor.bytes)))
        });
        let tensors: Result<Vec<_>, _> = tensors.filter_map(Result::transpose).collect();
        Ok(Self::Safetensors(tensors?))
    }
}

impl Tensor {
    fn new(name: String, shape: &[usize], kind: GgmlType, bytes: u64) -> Self {
        let columns = shape.last().map_or(1, |columns| *columns as u64);
        let rows = shape.iter().rev().skip(1).map(|size| *size as u64).product();
        Self { name, rows, columns, kind, bytes }
    }

    fn is_layer(&self) -> bool {
        ["blk.", "layer.", "layers."].iter().any(|part| self.name.contains(part))
    }

    fn is_embedding(&self) -> bool {
        ["token_embd.weight", "embed_tokens.weight"].iter().any(|end| self.name.ends_with(end))
    }

    fn is_head(&self) -> bool {
        self.name == "output.weight" || self.name == "lm_head.weight"
    }

    /// In a CPU's memory: vectors and tables of positions stay f32, matrices are packed.
    fn cpu_bytes(&self) -> u64 {
        if self.rows <= 1 {
            return self.columns * 4;
        }
        packed_format(self.kind).bytes(self.rows as usize, self.columns as usize) as u64
    }
}

impl WeightBytes {
    fn of_tensors(tensors: &[Tensor], shape: &Shape) -> Self {
        let mut this = Self::default();
        let mut formats: Vec<(&'static str, u64)> = Vec::new();
        for tensor in tensors {
            let params = tensor.rows * tensor.columns;
            this.params += params;
            this.total += tensor.bytes;
            this.cpu += tensor.cpu_bytes();
            this.largest = this.largest.max(tensor.bytes);
            if tensor.is_layer() {
                this.layer_params += params;
                this.layers += tensor.bytes;
                this.quantised |= tensor.rows > 1 && is_quantised(tensor.kind);
            } else if tensor.is_head() || (shape.tied && tensor.is_embedding()) {
                this.head_params += params;
                this.head += tensor.bytes;
                if shape.decoder {
                    this.coarse += coarse_bytes(tensor.kind, tensor.rows, tensor.columns);
                }
            }
            let name = format_name(tensor.kind);
            match formats.iter_mut().find(|(known, _)| *known == name) {
                Some((_, bytes)) => *bytes += tensor.bytes,
                None => formats.push((name, tensor.bytes)),
            }
        }
        formats.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
        this.formats = formats.into_iter().map(|(name, _)| name).collect();
        this
    }

    fn of_shape(shape: &Shape, kind: GgmlType) -> Self {
        let (elements, block_bytes) = kind.block().unwrap_or((1, 4));
        let bytes = |params: u64| params.div_ceil(elements) * block_bytes;
        let parameters = shape.parameters();
        let params = parameters.total(shape.tied);
        let coarse = if shape.decoder { coarse_bytes(kind, shape.vocab, shape.hidden) } else { 0 };
        // Sixteen outputs of 256 inputs: a whole number of panels and blocks in every form.
        let sample = packed_format(kind).bytes(16, 256) as f64 / 4096.0;
        Self {
            params,
            layer_params: parameters.layers,
            head_params: parameters.head,
            total: bytes(params),
            layers: bytes(parameters.layers),
            head: bytes(parameters.head),
            largest: bytes((shape.vocab * shape.hidden).max(shape.ff * shape.hidden)),
            cpu: (params as f64 * sample) as u64,
            coarse,
            formats: vec![format_name(kind)],
            quantised: is_quantised(kind),
        }
    }
}

/// [`WeightBytes::coarse`] of a head.
fn coarse_bytes(kind: GgmlType, rows: u64, columns: u64) -> u64 {
    Coarse::bytes(packed_format(kind), rows as usize, columns as usize) as u64
}

impl Model {
    /// Everything that `names` mean; without names, every manifest of the configuration.
    ///
    /// # Errors
    /// The first that cannot be found or read.
    pub(super) fn all(
        config: &Config,
        names: &[String],
        dtype: Option<&str>,
    ) -> Result<Vec<Self>, PlanError> {
        let models: Vec<Self> = if names.is_empty() {
            let read = |manifest| Self::from_manifest(config, manifest);
            config.manifests.iter().map(read).collect::<Result<_, _>>()?
        } else {
            names.iter().map(|name| Self::find(config, name, dtype)).collect::<Result<_, _>>()?
        };
        let mut seen = BTreeSet::new();
        match models.iter().find(|model| !seen.insert(&model.name)) {
            Some(twice) => {
                let message = format!("the model {:?} is named twice", twice.name);
                Err(PlanError::new(Fault::Usage, message))
            }
            None => Ok(models),
        }
    }

    fn find(config: &Config, name: &str, dtype: Option<&str>) -> Result<Self, PlanError> {
        if let Some(shape) = name.strip_prefix("shape:") {
            return Self::built_in(shape, dtype);
        }
        let called = |manifest: &&Manifest| {
            manifest.name == name || manifest.aliases.iter().any(|alias| alias == name)
        };
        if let Some(manifest) = config.manifests.iter().find(called) {
            return Self::from_manifest(config, manifest);
        }
        if name.starts_with("hub:") || name.starts_with("https://") {
            return Self::from_address(config, name);
        }
        let path = Path::new(name);
        if path.exists() {
            return Self::from_path(path, dtype);
        }
        let known: Vec<&str> = config.manifests.iter().map(|one| one.name.as_str()).collect();
        let hint = nearest(name, known.iter().copied())
            .map(|nearest| format!(" did you mean {nearest}?"))
            .unwrap_or_default();
        let known = known.join(", ");
        let shapes = built_in_names().join(", ");
        let message = format!(
            "{name:?} is no model, no file and no folder:{hint} models here are {known}; a shape \
             without weights is shape:NAME, with {shapes}"
        );
        Err(PlanError::new(Fault::Usage, message))
    }

    fn from_manifest(config: &Config, manifest: &Manifest) -> Result<Self, PlanError> {
        let here = present(manifest, &config.models);
        let open = |file| Source::of_manifest(&manifest.name, file, &here, &config.models);
        let weight = |file: &&ManifestFile| {
            file.file.ends_with(".gguf") || file.file.ends_with(".safetensors")
        };
        let weights: Vec<Source> =
            manifest.files.iter().filter(weight).map(open).collect::<Result<_, _>>()?;
        let settings = manifest.files.iter().find(|file| file.file == "config.json");
        let settings = settings.map(open).transpose()?;
        let mut model = Self::from_sources(&manifest.name, weights, settings)?;
        model.context = manifest.limits.context;
        model.seats = manifest.limits.seats;
        model.latency_seconds = manifest.objective.latency_seconds;
        model.manifest = manifest_text(&config.models.dir, &manifest.name);
        Ok(model)
    }

    fn from_path(path: &Path, dtype: Option<&str>) -> Result<Self, PlanError> {
        let ending = path.extension().map(|ending| ending.to_string_lossy().into_owned());
        let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let mut weights = Vec::new();
            for entry in std::fs::read_dir(path).map_err(|error| unreadable(path, &error))? {
                let file = entry.map_err(|error| unreadable(path, &error))?.path();
                let ending = file.extension().unwrap_or_default();
                if ending == "gguf" || ending == "safetensors" {
                    weights.push(file);
                }
            }
            weights.sort();
            let config = Source::beside(&path.join("config.json"))?;
            return match config {
                Some(config) if weights.is_empty() => {
                    Self::from_shape_json(&name, &config.json()?, dtype)
                }
                config => {
                    let weights = weights.iter().map(|path| Source::file(path));
                    Self::from_sources(&name, weights.collect::<Result<_, _>>()?, config)
                }
            };
        }
        match ending.as_deref() {
            Some("toml") => {
                let text = Source::file(path)?.text()?;
                let shape: Json = toml::from_str(&text).map_err(|error| {
                    let message = format!("{}: {}", path.display(), error.message());
                    PlanError::new(Fault::Data, message)
                })?;
                Self::from_shape_json(&stem, &shape, dtype)
            }
            Some("json") => {
                let folder = path.parent().and_then(Path::file_name);
                let name = folder.map_or(stem, |folder| folder.to_string_lossy().into_owned());
                Self::from_shape_json(&name, &Source::file(path)?.json()?, dtype)
            }
            _ => {
                let config = Source::beside(&path.with_file_name("config.json"))?;
                Self::from_sources(&stem, vec![Source::file(path)?], config)
            }
        }
    }

    fn from_sources(
        name: &str,
        weights: Vec<Source>,
        config: Option<Source>,
    ) -> Result<Self, PlanError> {
        let fail = |what: String| PlanError::new(Fault::Data, format!("{name}: {what}"));
        let mut tensors = Vec::new();
        for source in weights {
            match WeightHeader::read(source)? {
                WeightHeader::Gguf(header) => return Self::from_gguf(name, *header).map_err(fail),
                WeightHeader::Safetensors(found) => tensors.extend(found),
            }
        }
        if tensors.is_empty() {
            return Err(fail("no weights: a .gguf or .safetensors file is needed".into()));
        }
        let Some(config) = config else {
            return Err(fail("safetensors need config.json beside them".into()));
        };
        let config = config.json()?;
        let shape = Shape::from_config(&config).map_err(&fail)?;
        let description = Description::Json { config: &config, pooling: None, modules: None };
        Ok(Self::described(name, &description, shape, &tensors))
    }

    /// A weight file elsewhere, by its address alone.
    fn from_address(config: &Config, address: &str) -> Result<Self, PlanError> {
        let weights = Source::at(address, &config.models)?;
        let name = weights.stem().to_owned();
        let settings = match weights.is_gguf() {
            true => None,
            false => Some(Source::at(&sibling(address, "config.json"), &config.models)?),
        };
        Self::from_sources(&name, vec![weights], settings)
    }

    fn from_gguf(name: &str, header: Header) -> Result<Self, String> {
        let shape = Shape::from_gguf(&header)?;
        let mut tensors = Vec::new();
        for (tensor, info) in &header.tensors {
            if info.kind.block().is_none() {
                return Err(format!("tensor {tensor} has format {:?}: size unknown", info.kind));
            }
            tensors.push(Tensor::new(tensor.clone(), &info.shape, info.kind, info.bytes));
        }
        Ok(Self::described(name, &Description::Gguf(&header), shape, &tensors))
    }

    /// Of the context, what the server makes of the description counts.
    fn described(name: &str, of: &Description<'_>, mut shape: Shape, tensors: &[Tensor]) -> Self {
        let outline = arch::outline(of).map_err(|error| error.to_string());
        if let Ok(outline) = &outline {
            shape.context = outline.context as u64;
        }
        let weights = WeightBytes::of_tensors(tensors, &shape);
        Self { refused: outline.err(), ..Self::new(name, "header", shape, weights) }
    }

    fn built_in(name: &str, dtype: Option<&str>) -> Result<Self, PlanError> {
        let (name, suffix) = name.split_once('@').map_or((name, None), |(a, b)| (a, Some(b)));
        let found = built_in().into_iter().find(|shape| shape["name"].as_str() == Some(name));
        let Some(shape) = found else {
            let known = built_in_names();
            let hint = nearest(name, known.iter().map(String::as_str))
                .map(|nearest| format!(" did you mean shape:{nearest}?"))
                .unwrap_or_default();
            let known = known.join(", ");
            let message = format!("no shape is called {name:?}:{hint} shapes are {known}");
            return Err(PlanError::new(Fault::Usage, message));
        };
        Self::from_shape_json(name, &shape, suffix.or(dtype))
    }

    fn from_shape_json(name: &str, json: &Json, dtype: Option<&str>) -> Result<Self, PlanError> {
        let text = |key: &str| json.get(key).and_then(Json::as_str);
        let name = text("name").unwrap_or(name);
        let given = dtype.or(text("dtype")).or(text("torch_dtype")).unwrap_or("bf16");
        let Some(kind) = kind_of(given) else {
            let known = FORMATS.map(|(name, _)| name).join(", ");
            let message = format!("{name}: dtype {given:?} is not known; known are {known}");
            return Err(PlanError::new(Fault::Usage, message));
        };
        let shape = Shape::from_config(json)
            .map_err(|what| PlanError::new(Fault::Data, format!("{name}: {what}")))?;
        let weights = WeightBytes::of_shape(&shape, kind);
        let limit = json.get("context").and_then(Json::as_u64);
        let context = limit.and_then(|limit| u32::try_from(limit).ok());
        Ok(Self { context, ..Self::new(name, "shape", shape, weights) })
    }

    fn new(name: &str, from: &'static str, shape: Shape, weights: WeightBytes) -> Self {
        let task = match (shape.decoder, shape.scores) {
            (true, _) => "generate",
            (false, true) => "score",
            (false, false) => "embed",
        };
        Self {
            name: name.to_owned(),
            task,
            from,
            shape,
            weights,
            context: None,
            seats: None,
            latency_seconds: None,
            manifest: None,
            refused: None,
        }
    }

    /// The same model with its weights in another format; none where that is not smaller.
    pub(super) fn in_format(&self, name: &str) -> Option<Self> {
        let weights = WeightBytes::of_shape(&self.shape, kind_of(name)?);
        (weights.total < self.weights.total).then(|| Self { weights, ..self.clone() })
    }

    /// What the engine would size its workspace for.
    pub(super) fn capacity(&self, context: u32) -> Capacity {
        let wish = Wish {
            weight: 1.0,
            context: Some(context),
            seats: self.seats,
            weight_bytes: self.weights.total,
        };
        budget::capacity(&self.shape.outline(), &wish)
    }
}

/// Formats by the names that people give them.
const FORMATS: [(&str, GgmlType); 11] = [
    ("f32", GgmlType::F32),
    ("f16", GgmlType::F16),
    ("bf16", GgmlType::BF16),
    ("q4_0", GgmlType::Q4_0),
    ("q4_1", GgmlType::Q4_1),
    ("q5_0", GgmlType::Q5_0),
    ("q5_1", GgmlType::Q5_1),
    ("q8_0", GgmlType::Q8_0),
    ("q4_k", GgmlType::Q4_K),
    ("q5_k", GgmlType::Q5_K),
    ("q6_k", GgmlType::Q6_K),
];

fn kind_of(name: &str) -> Option<GgmlType> {
    let name = name.to_lowercase().replace("bfloat", "bf").replace("float", "f");
    FORMATS.iter().find(|(known, _)| *known == name).map(|(_, kind)| *kind)
}

fn format_name(kind: GgmlType) -> &'static str {
    FORMATS.iter().find(|(_, known)| *known == kind).map_or("other", |(name, _)| name)
}

fn is_quantised(kind: GgmlType) -> bool {
    packed_format(kind) != PackedFormat::F32
}

fn built_in() -> Vec<Json> {
    let all: Json = toml::from_str(SHAPES).expect("the built-in shapes are sound");
    all["shape"].as_array().cloned().unwrap_or_default()
}

fn built_in_names() -> Vec<String> {
    let name = |shape: Json| shape["name"].as_str().map(str::to_owned);
    built_in().into_iter().filter_map(name).collect()
}

/// The address of another file in the same folder.
fn sibling(address: &str, file: &str) -> String {
    let address = address.split(['?', '#']).next().unwrap_or(address);
    let folder = address.rsplit_once('/').map_or(address, |(folder, _)| folder);
    format!("{folder}/{file}")
}
