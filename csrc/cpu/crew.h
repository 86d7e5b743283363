// Threads that help with a call, if they come in time.
#pragma once

#include <cstdint>
#include <functional>

namespace cwclip::cpu {

// Calls work() here and on up to `helpers` other threads at once, and returns when all that began have ended. Nobody
// waits for a helper to wake up: whoever is late finds the job closed. So work() must get everything done even if it
// is called once; and it must not throw.
//
// Why not torch's parallel_for: its region ends when every thread of the pool has begun and ended. A sleeping thread
// may take as long to be scheduled (8 ms were seen, on an idle virtual machine of 2 cores) as hundreds of small
// gradients take altogether. A queue has no need of it.
void run_with_helpers(int64_t helpers, const std::function<void()>& work);

}  // namespace cwclip::cpu
