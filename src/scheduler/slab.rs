//! A vector with holes: stable indices without hashing. Knows nothing of what it holds.

use std::ops::{Index, IndexMut};

/// Values under stable indices, which are reused after removal.
#[derive(Debug)]
pub(super) struct Slab<T> {
    entries: Vec<Option<T>>,
    vacant: Vec<u32>,
}

impl<T> Slab<T> {
    /// An empty slab.
    pub(super) fn new() -> Self {
        Self { entries: Vec::new(), vacant: Vec::new() }
    }

    /// Puts a value in and names it.
    pub(super) fn insert(&mut self, value: T) -> u32 {
        match self.vacant.pop() {
            Some(index) => {
                self.entries[index as usize] = Some(value);
                index
            }
            None => {
                self.entries.push(Some(value));
                self.entries.len() as u32 - 1
            }
        }
    }

    /// Takes a value out.
    pub(super) fn remove(&mut self, index: u32) -> T {
        self.vacant.push(index);
        self.entries[index as usize].take().expect("the index is live")
    }

    /// Indices of all values, ascending.
    pub(super) fn indices(&self) -> impl Iterator<Item = u32> + '_ {
        (0..self.entries.len() as u32).filter(|&index| self.entries[index as usize].is_some())
    }
}

impl<T> Index<u32> for Slab<T> {
    type Output = T;

    fn index(&self, index: u32) -> &T {
        self.entries[index as usize].as_ref().expect("the index is live")
    }
}

impl<T> IndexMut<u32> for Slab<T> {
    fn index_mut(&mut self, index: u32) -> &mut T {
        self.entries[index as usize].as_mut().expect("the index is live")
    }
}
