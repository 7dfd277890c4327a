//! The packet mark between Basal's programs and the host stack: `magic | (identity low 16 bits) << 16 | identity bits
//! 16 to 23`, Cilium's encoding. Bits 12 to 15 stay free: Kubernetes uses 0x4000 and 0x8000.

/// Bits of the mark that say who set it and what the rest means.
pub const MAGIC_MASK: u32 = 0x0f00;
/// On encapsulated packets: the rest is the source identity.
pub const MAGIC_OVERLAY: u32 = 0x0400;
/// For an address that nobody has: the stack tells the sender. Basal's own, Cilium leaves it free.
pub const MAGIC_UNREACHABLE: u32 = 0x0700;
/// From the local host.
pub const MAGIC_HOST: u32 = 0x0c00;
/// From an endpoint; the rest is its identity.
pub const MAGIC_IDENTITY: u32 = 0x0f00;

/// A mark that carries an identity of at most 24 bits.
#[must_use]
#[inline(always)]
pub const fn encode(magic: u32, identity: u32) -> u32 {
    magic | (identity & 0xffff) << 16 | (identity >> 16) & 0xff
}

/// The magic of a mark.
#[must_use]
#[inline(always)]
pub const fn magic(mark: u32) -> u32 {
    mark & MAGIC_MASK
}

/// The identity in a mark whose magic says that there is one.
#[must_use]
#[inline(always)]
pub const fn identity(mark: u32) -> u32 {
    mark >> 16 | (mark & 0xff) << 16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_survive_the_mark() {
        assert_eq!(encode(MAGIC_IDENTITY, 0x0012_3456), 0x3456_0f12);
        for id in [0, 1, 256, 0xffff, 0x1_0000, 0xff_ffff] {
            let mark = encode(MAGIC_IDENTITY, id);
            assert_eq!((magic(mark), identity(mark)), (MAGIC_IDENTITY, id));
            assert_eq!(mark & 0xf000, 0, "kube-proxy's bits stay free");
            assert_eq!(identity(mark | 0x4000), id, "and do not disturb");
        }
    }
}
