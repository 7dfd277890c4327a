//! The programs.
//!
//! A verifier rule shapes all of this: programs keep packet headers on their stack (512 bytes), so headers are loaded
//! by helper rather than read in place, which also copes with packets whose headers are not in linear memory.

mod context;
mod direct;
mod flows;
mod host;
mod lxc;
mod maps;
mod netdev;
mod overlay;
mod rewrite;
mod segment;
mod view;

use basal_maps::config::Config;

/// Load-time constants, written by the loader.
#[unsafe(no_mangle)]
static BASAL_CONFIG: Config = Config::UNSET;

/// Some helpers are for programs under the GPL only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// The constants as the loader wrote them.
#[inline(always)]
fn config() -> Config {
    // SAFETY: the pointer is to a static. Read as volatile, because the compiler must not assume the value it sees.
    unsafe { core::ptr::read_volatile(&raw const BASAL_CONFIG) }
}

/// Nothing here panics; the compiler wants the handler all the same.
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
