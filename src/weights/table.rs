//! Which file has which tensor, where, and in what format, whatever the kind of files. Knows no
//! architecture.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::LoadError;
use crate::store::HeaderError;
use crate::store::gguf::{self, GgmlType, Header};
use crate::store::safetensors::{self, DType, index};

/// The files of a model, opened.
#[derive(Debug)]
pub(super) struct Table {
    files: Vec<File>,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Gguf(Header),
    /// Each tensor with its file's place in `files`.
    Safetensors(BTreeMap<String, (usize, safetensors::TensorInfo)>),
}

/// A tensor's format and place.
pub(super) struct Found {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) kind: GgmlType,
    file: usize,
    offset: u64,
    bytes: usize,
}

impl Table {
    /// One file, by its name's ending.
    pub(super) fn open(path: &Path) -> Result<Self, LoadError> {
        if path.extension().is_some_and(|ending| ending == "gguf") {
            let header = gguf::read(path).map_err(unusable(path))?;
            return Ok(Self { files: vec![open(path)?], kind: Kind::Gguf(header) });
        }
        let mut table = Self { files: Vec::new(), kind: Kind::Safetensors(BTreeMap::new()) };
        table.add(path)?;
        Ok(table)
    }

    /// The safetensors files that an index names; `find` says where each lies.
    pub(super) fn open_index(
        path: &Path,
        find: impl Fn(&str) -> Option<PathBuf>,
    ) -> Result<Self, LoadError> {
        let tensors = index::read(path).map_err(unusable(path))?;
        let invalid = |what: String| unusable(path)(HeaderError::Invalid(what));
        let mut table = Self { files: Vec::new(), kind: Kind::Safetensors(BTreeMap::new()) };
        let mut places = BTreeMap::new();
        for name in tensors.values() {
            if places.contains_key(name) {
                continue;
            }
            let shard = find(name).ok_or_else(|| {
                invalid(format!("it names '{name}', which is not among the model's files"))
            })?;
            places.insert(name, table.files.len());
            table.add(&shard)?;
        }
        for (tensor, name) in &tensors {
            let Kind::Safetensors(known) = &table.kind else { unreachable!("made above") };
            if known.get(tensor).map(|(file, _)| file) != places.get(name) {
                return Err(invalid(format!("it says that '{name}' has tensor '{tensor}'")));
            }
        }
        Ok(table)
    }

    /// Adds the tensors of another safetensors file.
    fn add(&mut self, path: &Path) -> Result<(), LoadError> {
        let Kind::Safetensors(tensors) = &mut self.kind else {
            unreachable!("only safetensors files come in several")
        };
        for (name, tensor) in safetensors::read(path).map_err(unusable(path))? {
            if tensors.insert(name.clone(), (self.files.len(), tensor)).is_some() {
                let twice = format!("tensor '{name}' is in another file too");
                return Err(unusable(path)(HeaderError::Invalid(twice)));
            }
        }
        self.files.push(open(path)?);
        Ok(())
    }

    pub(super) fn gguf(&self) -> Option<&Header> {
        match &self.kind {
            Kind::Gguf(header) => Some(header),
            Kind::Safetensors(_) => None,
        }
    }

    pub(super) fn has(&self, tensor: &str) -> bool {
        match &self.kind {
            Kind::Gguf(header) => header.tensors.contains_key(tensor),
            Kind::Safetensors(tensors) => tensors.contains_key(tensor),
        }
    }

    /// Rows, columns and format of every tensor; those that no kernel can read are left out.
    pub(super) fn shapes(&self) -> Vec<(usize, usize, GgmlType)> {
        let names: Vec<&String> = match &self.kind {
            Kind::Gguf(header) => header.tensors.keys().collect(),
            Kind::Safetensors(tensors) => tensors.keys().collect(),
        };
        let found = names.into_iter().filter_map(|name| self.find(name).ok());
        found.map(|tensor| (tensor.rows, tensor.columns, tensor.kind)).collect()
    }

    pub(super) fn find(&self, name: &str) -> Result<Found, LoadError> {
        let (shape, kind, file, offset, bytes) = match &self.kind {
            Kind::Gguf(header) => {
                let tensor = header.tensors.get(name).ok_or_else(|| super::missing(name))?;
                (&tensor.shape, tensor.kind, 0, tensor.offset, tensor.bytes)
            }
            Kind::Safetensors(tensors) => {
                let (file, tensor) = tensors.get(name).ok_or_else(|| super::missing(name))?;
                let kind = float_kind(name, &tensor.dtype)?;
                (&tensor.shape, kind, *file, tensor.offset, tensor.bytes)
            }
        };
        let columns = shape.last().copied().unwrap_or(1);
        let rows = shape.iter().rev().skip(1).product();
        Ok(Found { rows, columns, kind, file, offset, bytes: bytes as usize })
    }

    pub(super) fn read(&self, name: &str, tensor: &Found) -> Result<Vec<u8>, LoadError> {
        let mut data = vec![0; tensor.bytes];
        let read = self.files[tensor.file].read_exact_at(&mut data, tensor.offset);
        read.map_err(|source| LoadError::Read { tensor: name.to_owned(), source })?;
        Ok(data)
    }
}

fn open(path: &Path) -> Result<File, LoadError> {
    File::open(path).map_err(|error| unusable(path)(error.into()))
}

/// A header's fault with the name of its file.
fn unusable(path: &Path) -> impl Fn(HeaderError) -> LoadError {
    let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    move |source| LoadError::Header { file: file.clone(), source }
}

fn float_kind(name: &str, dtype: &DType) -> Result<GgmlType, LoadError> {
    match dtype {
        DType::F32 => Ok(GgmlType::F32),
        DType::F16 => Ok(GgmlType::F16),
        DType::BF16 => Ok(GgmlType::BF16),
        other => Err(LoadError::Shape(format!("tensor '{name}' has format {other:?}"))),
    }
}
