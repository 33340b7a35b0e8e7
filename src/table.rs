//! Tables for people: columns as wide as their widest cell. Knows nothing of what is in them.

use std::fmt;

/// Rows of `N` cells under a line of headings. A heading that begins with `>` is of a column of
/// numbers, which end together.
#[derive(Debug)]
pub struct Table<const N: usize> {
    right: [bool; N],
    rows: Vec<[String; N]>,
}

impl<const N: usize> Table<N> {
    /// A table with only its headings.
    pub fn new(headings: [&str; N]) -> Self {
        let right = headings.map(|heading| heading.starts_with('>'));
        let headings = headings.map(|heading| heading.trim_start_matches('>').to_owned());
        Self { right, rows: vec![headings] }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: [String; N]) {
        self.rows.push(cells);
    }

    /// Whether there are only headings.
    pub fn is_empty(&self) -> bool {
        self.rows.len() == 1
    }
}

impl<const N: usize> fmt::Display for Table<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let length = |cell: &str| cell.chars().count();
        let widest = |column: usize| self.rows.iter().map(|row| length(&row[column])).max();
        let widths: [usize; N] = std::array::from_fn(|column| widest(column).unwrap_or(0));
        for row in &self.rows {
            let mut line = String::new();
            for ((cell, width), right) in row.iter().zip(widths).zip(self.right) {
                let padding = " ".repeat(width - length(cell));
                let cell = if right { [padding.as_str(), cell] } else { [cell.as_str(), &padding] };
                line.extend(cell);
                line.push_str("  ");
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::Table;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(["NAME", ">BYTES", "WHERE"]);
        assert!(table.is_empty());
        table.row(["a-long-name".into(), "7".into(), String::new()]);
        table.row(["ü".into(), "1234567".into(), "here".into()]);
        let expected = "NAME           BYTES  WHERE\n\
                        a-long-name        7\n\
                        ü            1234567  here\n";
        assert_eq!(table.to_string(), expected);
    }
}
