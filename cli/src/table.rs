//! Tables as Go's `text/tabwriter` lays them out with a minimal width of 5, a padding of 3 and spaces, every cell
//! ending in a tab: a column is as wide as its widest cell plus padding.

/// Columns are at least so wide.
const MIN_WIDTH: usize = 5;
/// Spaces behind the widest cell of a column.
const PADDING: usize = 3;

/// Lays rows out.
pub(crate) fn lay_out<R: AsRef<[String]>>(rows: &[R]) -> String {
    let columns = rows.iter().map(|row| row.as_ref().len()).max().unwrap_or_default();
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.as_ref().get(column));
        let widest = cells.map(|cell| cell.chars().count()).max().unwrap_or_default();
        // tabwriter leaves a column without any text away.
        if widest == 0 { 0 } else { (widest + PADDING).max(MIN_WIDTH) }
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        for (cell, width) in row.as_ref().iter().zip(&widths) {
            text.push_str(cell);
            text.extend(std::iter::repeat_n(' ', width.saturating_sub(cell.chars().count())));
        }
        text.push('\n');
    }
    text
}

/// A row.
pub(crate) fn row<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.map(str::to_owned).to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell_and_three_spaces() {
        let rows = [row(["NODE ID", "IP ADDRESSES", "SPI"]), row(["0x1", "10.0.0.7", "0"])];
        assert_eq!(lay_out(&rows), "NODE ID   IP ADDRESSES   SPI   \n0x1       10.0.0.7       0     \n");
        assert_eq!(lay_out(&[row(["a", "b"])]), "a    b    \n", "no column is narrower than five");
    }
}
