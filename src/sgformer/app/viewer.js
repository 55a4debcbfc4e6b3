// An image with a map over it; hovering highlights all places that share one key/value token.
const POINT = "sgformer-point"; // side-by-side viewers highlight the same place

export default {
  props: { result: String, kind: String, block: String, opacity: Number },
  data: () => ({ grid: null, at: null, shape: 1 }),
  template: `
    <div class="sg-viewer">
      <div class="sg-picture" :style="{ aspectRatio: shape, '--shape': shape }" tabindex="0" role="img" aria-label="The image with a map over it; arrow keys move the place"
           @pointermove="move" @pointerdown="move" @pointerleave="point(null)" @keydown="step">
        <img v-if="result" class="sg-image" :src="base + '/image.png'" alt="" draggable="false"
             @load="shape = $event.target.naturalWidth / $event.target.naturalHeight">
        <img v-if="result" class="sg-layer" :src="base + '/' + kind + '/' + block + '.png'" alt=""
             :style="{ opacity: at && grid ? 0 : opacity }" draggable="false">
        <canvas v-show="at && grid" class="sg-layer" ref="canvas"></canvas>
        <i v-if="at && grid" class="sg-ring" :style="ring"></i>
      </div>
      <p class="sg-hint" v-html="hint"></p>
    </div>`,
  computed: {
    base() { return "/results/" + this.result; },
    cell() {
      if (!this.at || !this.grid) return null;
      const [row, column] = [Math.floor(this.at.y * this.grid.height), Math.floor(this.at.x * this.grid.width)];
      return { row, column, index: row * this.grid.width + column };
    },
    ring() {
      const part = (n, of) => (100 * n) / of + "%";
      const { width, height } = this.grid;
      return { left: part(this.cell.column, width), top: part(this.cell.row, height), width: part(1, width), height: part(1, height) };
    },
    hint() {
      if (!this.result) return "";
      if (!this.grid) return "No reallocation in this block: every place is its own key/value token.";
      if (!this.cell) return `${matchMedia("(hover: none)").matches ? "Touch" : "Hover over"} the image to see which places share one key/value token.`;
      const { tokens, regions, names, colours, count } = this.grid;
      const token = tokens[this.cell.index], region = regions[this.cell.index];
      const shared = tokens.filter((t) => t === token).length;
      const dot = `<i class="sg-dot" style="background:rgb(${colours[region]})"></i>`;
      const places = shared === 1 ? "a single place" : `<b>${shared} places</b> merged into one`;
      return `${dot}key/value token <b>${token + 1}</b> of ${count}, ${names[region] || "middle"} region: ${places}`;
    },
  },
  watch: {
    cell: "paint",
    result: "fetchGrid",
    block: "fetchGrid",
  },
  mounted() {
    this.onPoint = (event) => (this.at = event.detail);
    window.addEventListener(POINT, this.onPoint);
    this.fetchGrid();
  },
  unmounted() { window.removeEventListener(POINT, this.onPoint); },
  methods: {
    async fetchGrid() {
      if (!this.result) return;
      const url = `${this.base}/tokens/${this.block}`;
      const response = await fetch(url);
      const grid = response.ok ? await response.json() : null;
      if (url !== `${this.base}/tokens/${this.block}`) return; // superseded by a later request
      this.grid = grid;
      this.paint();
    },
    point(at) { window.dispatchEvent(new CustomEvent(POINT, { detail: at })); },
    move(event) {
      const box = event.currentTarget.getBoundingClientRect();
      const inside = (value) => Math.min(Math.max(value, 0), 0.9999);
      this.point({ x: inside((event.clientX - box.left) / box.width), y: inside((event.clientY - box.top) / box.height) });
    },
    step(event) {
      const way = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (event.key === "Escape") this.point(null);
      if (!way || !this.grid) return;
      event.preventDefault();
      const { width, height } = this.grid;
      const from = this.cell || { row: height >> 1, column: width >> 1 };
      const inside = (value, size) => (Math.min(Math.max(value, 0), size - 1) + 0.5) / size;
      this.point({ x: inside(from.column + way[1], width), y: inside(from.row + way[0], height) });
    },
    paint() {
      if (!this.cell) return;
      const { width, height, tokens, regions, colours } = this.grid, canvas = this.$refs.canvas;
      [canvas.width, canvas.height] = [width, height];
      const pixels = new ImageData(width, height), token = tokens[this.cell.index];
      tokens.forEach((other, i) => pixels.data.set(other === token ? [...colours[regions[i]], 100] : [247, 248, 250, 180], 4 * i));
      canvas.getContext("2d").putImageData(pixels, 0, 0);
    },
  },
};
