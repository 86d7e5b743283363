/* How blocks share out work in csrc/cuda/kernels.cuh, for spin: every interleaving of a few blocks over a few tiles.
 *
 *   spin -DFORM=2 -DBLOCKS=2 -DRESIDENT=2 -DTILES=4 -DPER_COMPONENT=2 -a queue.pml
 *   gcc -O2 -w -DSAFETY -o pan pan.c && ./pan -m200000 -w24
 *
 * FORM            1: Mode::sum, then Mode::scale; 2: Mode::both
 * BLOCKS          in each launch
 * RESIDENT        blocks that run at a time; the others begin when one has ended, and none is ever interrupted for good
 * TILES           in all; PER_COMPONENT consecutive ones are a component
 * BREAK           breaks one rule, to see that the model notices (tests/test_queue_model.py); 0 or not given: none
 *
 * Which components are clipped is any choice. A block is a scheduler and a worker that meet at a barrier, as there. What a
 * GPU does one at a time, one atomic or one access to shared memory, is one step here. Memory is in order here; that each
 * release and acquire is where it is needed, ThreadSanitizer judges (tests/native/hand_over.cpp).
 *
 * No block may be left waiting (an invalid end state), and the assertions hold: a tile is measured once; a component is
 * added up when all of its tiles have been handed in; what is clipped is scaled once, after its coefficient was written,
 * and nothing else; everything in the workspace is zero at the end.
 */
#ifndef BREAK
#define BREAK 0
#endif
#define COMPONENTS ((TILES + PER_COMPONENT - 1) / PER_COMPONENT)
#define LAUNCHES (3 - FORM)

mtype = { sum, scale, none, leave_ };

/* The workspace. A place in the list holds 1 + tile, 0 if nothing. */
byte sum_ticket, scale_ticket, listed, finished, left;
byte done[COMPONENTS];
byte list[TILES];
bool partial[TILES];

bool clipped[COMPONENTS];   /* what the norms will say */
bool coef[COMPONENTS];      /* whether it has been written */
byte measured[TILES], scaled[TILES];

byte running, ended;        /* blocks, of this launch */
byte launch;                /* the one that blocks may begin in */

chan job_of[BLOCKS * LAUNCHES] = [0] of { mtype, byte };
chan barrier[BLOCKS * LAUNCHES] = [0] of { bit };

inline tiles_in(c, n) { n = (c == COMPONENTS - 1 -> TILES - (COMPONENTS - 1) * PER_COMPONENT : PER_COMPONENT) }

inline list_component(c) {
  d_step { place = listed; listed = listed + count }
  i = 0;
  do
  :: i < count -> list[place + i] = 1 + c * PER_COMPONENT + i; i++
  :: else -> break
  od
}

inline finish_component(c) {
  i = 0;
  do
  :: i < count -> assert(partial[c * PER_COMPONENT + i]); i++
  :: else -> break
  od;
#if BREAK != 1 /* done counters stay as they are */
  done[c] = 0;
#endif
#if BREAK == 2 /* counted before its tiles are listed */
  finished++;
#endif
#if BREAK == 3 /* listed before its coefficient is written */
  if :: clipped[c] -> list_component(c) :: else fi;
  coef[c] = true;
#else
  coef[c] = true;
  if :: clipped[c] -> list_component(c) :: else fi;
#endif
#if BREAK != 2
  finished++;
#endif
}

inline hand_in(tile) {
  c = tile / PER_COMPONENT;
  tiles_in(c, count);
  partial[tile] = true;
  d_step { place = done[c]; done[c]++ }
#if BREAK == 4 /* whoever is first adds up */
  if :: place == 0 -> finish_component(c) :: else fi
#else
  if :: place == count - 1 -> finish_component(c) :: else fi
#endif
}

/* Into work and tile. entry: what the block's place in the list holds. */
inline next(sum_in_hand) {
  do
  :: work = none; entry = 0; known = 0;
    if
    :: FORM == 2 ->
#if BREAK != 5 /* looks at `finished` after the list, not before */
      known = finished;
#endif
      if
      :: my_place < TILES ->
        entry = list[my_place];
        if
        :: entry != 0 -> list[my_place] = 0; d_step { my_place = scale_ticket; scale_ticket++ }
        :: else ->
#if BREAK == 6 /* gives its place up if it finds nothing there */
          if :: sum_in_hand -> d_step { my_place = scale_ticket; scale_ticket++ } :: else fi
#endif
          skip
        fi
      :: else
      fi
    :: FORM == 1 && number >= BLOCKS ->
      if
      :: my_place < known_listed ->
        entry = list[known_listed - 1 - my_place];
        list[known_listed - 1 - my_place] = 0;
        my_place = my_place + BLOCKS
      :: else
      fi
    :: else
    fi;
    if
    :: entry != 0 -> work = scale; tile = entry - 1; break
    :: else
    fi;
    if
    :: (FORM == 2 || number < BLOCKS) && my_tile < TILES ->
      work = sum; tile = my_tile;
      d_step { my_tile = sum_ticket; sum_ticket++ }
      break
    :: else
    fi;
#if BREAK != 7 /* waits although it has a sum to hand in */
    if :: sum_in_hand -> break :: else fi;
#endif
#if BREAK == 5
    known = finished;
#endif
    if
    :: FORM == 1 || known == COMPONENTS -> work = leave_; break
    :: else -> /* looks again when there is something new to see */
      (finished == COMPONENTS || (my_place < TILES && list[my_place] != 0))
    fi
  od
}

inline leave_launch() {
  skip;
#if BREAK != 8 /* nobody sets the counters back */
  if
  :: FORM == 1 && number < BLOCKS
  :: else ->
    d_step { place = left; left++ }
    if
    :: place == BLOCKS - 1 -> scale_ticket = 0; listed = 0; finished = 0; left = 0; sum_ticket = 0
    :: else
    fi
  fi
#endif
}

/* Block `number`, counted through both launches: what its scheduler warp does. */
proctype Block(byte number) {
  byte my_tile, my_place, known_listed, entry, known, tile, before, c, count, i, place;
  mtype work, current;
  atomic { launch == number / BLOCKS && running < RESIDENT -> running++ }
  if
  :: FORM == 2 || number < BLOCKS -> d_step { my_tile = sum_ticket; sum_ticket++ }
  :: else -> my_place = number - BLOCKS; known_listed = listed
  fi;
  if :: FORM == 2 -> d_step { my_place = scale_ticket; scale_ticket++ } :: else fi;
  mtype previous = none;
  next(false);
  do
  :: current = work;
    if :: current == leave_ -> break :: else fi;
    job_of[number] ! current, tile;
    place = tile; /* `tile` becomes the next one's */
    if
    :: previous == sum -> entry = place; hand_in(before); place = entry
    :: else
    fi;
    before = place;
    previous = current;
    next(current == sum);
    barrier[number] ? 0
  od;
  leave_launch();
  atomic {
    running--; ended++;
    if
    :: ended == BLOCKS -> ended = 0; launch++
    :: else
    fi
  }
}

proctype Worker(byte number) {
  byte tile;
end:
  do
  :: job_of[number] ? sum, tile -> measured[tile]++; barrier[number] ! 0
  :: job_of[number] ? scale, tile ->
    assert(coef[tile / PER_COMPONENT] && clipped[tile / PER_COMPONENT] && measured[tile] == 1);
    scaled[tile]++;
    barrier[number] ! 0
  :: job_of[number] ? none, tile -> barrier[number] ! 0
  od
}

init {
  byte n;
  atomic {
    n = 0;
    do
    :: n < COMPONENTS -> if :: clipped[n] = true :: clipped[n] = false fi; n++
    :: else -> break
    od;
    n = 0;
    do
    :: n < BLOCKS * LAUNCHES -> run Block(n); run Worker(n); n++
    :: else -> break
    od
  }
  launch == LAUNCHES;
  atomic {
    n = 0;
    do
    :: n < TILES ->
      assert(measured[n] == 1 && list[n] == 0);
      assert(scaled[n] == (clipped[n / PER_COMPONENT] -> 1 : 0));
      n++
    :: else -> break
    od;
    n = 0;
    do
    :: n < COMPONENTS -> assert(done[n] == 0 && coef[n]); n++
    :: else -> break
    od;
    assert(sum_ticket == 0 && scale_ticket == 0 && listed == 0 && finished == 0 && left == 0)
  }
}
