//! Markdown: tables, and the places in a page where they go.

use anyhow::{Context as _, ensure};

/// A table with a line for each row.
pub(crate) fn table<const N: usize>(titles: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let line = |cells: [String; N]| format!("| {} |\n", cells.map(|cell| cell.replace('|', "\\|")).join(" | "));
    let mut text = line(titles.map(str::to_owned)) + &format!("|{}\n", "---|".repeat(N));
    text.extend(rows.into_iter().map(line));
    text
}

/// A text as code; nothing for an empty one.
pub(crate) fn code(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!("`{text}`") }
}

/// The page with each named part replaced. A part stands between the two comments that [`marks`] makes.
pub(crate) fn fill(page: &str, parts: &[(&str, String)]) -> anyhow::Result<String> {
    let mut page = page.to_owned();
    for (name, text) in parts {
        let (begin, end) = marks(name);
        let place = || format!("the lines {begin:?} and {end:?} have to stand there, in this order and once");
        ensure!([&begin, &end].iter().all(|mark| page.matches(mark.as_str()).count() == 1), place());
        let (before, rest) = page.split_once(&begin).with_context(place)?;
        let (_, after) = rest.split_once(&end).with_context(place)?;
        page = format!("{before}{begin}\n{text}{end}{after}");
    }
    Ok(page)
}

/// What stands before and behind a part.
fn marks(name: &str) -> (String, String) {
    (format!("<!-- {name}: made by `cargo xtask docs`, do not edit -->"), format!("<!-- end of {name} -->"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_replaced_and_the_rest_stays() {
        let (begin, end) = marks("x");
        let page = |inside: &str| format!("a\n{begin}\n{inside}{end}\nb\n");
        let filled = fill(&page("old\n"), &[("x", "new\n".to_owned())]).unwrap();
        assert_eq!(filled, page("new\n"));
        assert_eq!(fill(&filled, &[("x", "new\n".to_owned())]).unwrap(), filled);
        for bad in ["", &page("")[..20], &page(&page("")), &format!("{end}{begin}")] {
            let error = fill(bad, &[("x", String::new())]).unwrap_err().to_string();
            assert!(error.contains(&begin), "{bad}: {error}");
        }
    }

    #[test]
    fn a_bar_in_a_cell_is_no_border() {
        let rows = [["`x|y`".to_owned(), "z".to_owned()]];
        assert_eq!(table(["a", "b"], rows), "| a | b |\n|---|---|\n| `x\\|y` | z |\n");
    }
}
