// A colour for a prompt that stays while it is in sight. The bare backbone has the neutral one, as has a ninth prompt.

const SLOTS = 8;
const owners = new Map(); // name -> slot, the one seen last at the end
let bare = null;

export function setBare(name) {
  bare = name;
}

/** The slot of a name, 0 for the neutral colour; `wanted` are names that keep theirs. */
export function slot(name, wanted = new Set()) {
  if (name === bare) return 0;
  let place = owners.get(name);
  if (place === undefined) place = free(wanted);
  if (place === 0) return 0;
  owners.delete(name);
  owners.set(name, place);
  return place;
}

function free(wanted) {
  const taken = new Set(owners.values());
  for (let i = 1; i <= SLOTS; i++) if (!taken.has(i)) return i;
  for (const [name, place] of owners) {
    if (wanted.has(name)) continue;
    owners.delete(name);
    return place;
  }
  return 0;
}
