//! From what was seen to what can be planned from.

use super::{
    error::NodeError,
    observe::{Observed, Presence, SeenNode, Unreadable, Valid},
};

/// Checks one observation. Foreign texts in `spec.ipam.podCIDRs` are no error: they are part of the state that the
/// plan answers.
///
/// # Errors
/// The Node or the CiliumNode does not parse: nothing is granted or released on such a view.
pub(super) fn validate(observed: Observed) -> Result<Valid, NodeError> {
    let Observed { node, cilium_node, record, leftovers } = observed;
    let cilium_node = cilium_node.transpose().map_err(NodeError::CiliumNodeInvalid)?;
    let presence = match node {
        SeenNode::Invalid(error) => return Err(NodeError::NodeInvalid(error)),
        SeenNode::Gone => Presence::Gone(leftovers),
        SeenNode::Present(node) => {
            let (mut carried, mut unreadable) = (Vec::new(), Vec::new());
            for (index, text) in cilium_node.iter().flat_map(|facts| &facts.pod_cidrs).enumerate() {
                match text.parse() {
                    Ok(block) => carried.push(block),
                    Err(error) => unreadable.push(Unreadable { index, error }),
                }
            }
            Presence::Present { node, carried, unreadable }
        }
    };
    Ok(Valid { presence, cilium_node, record })
}
