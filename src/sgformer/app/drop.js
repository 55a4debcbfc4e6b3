// Uploads an image that is dropped anywhere, pasted or selected.
export default {
  props: { network: String, tokens: Number, limit: Number, formats: String },
  data: () => ({ over: false }),
  template: `
    <label class="sg-drop" :class="{ 'sg-over': over }">
      <input type="file" accept="image/*" @change="take($event.target.files[0]); $event.target.value = ''">
      <svg viewBox="0 0 24 24" aria-hidden="true"><path d="M4 17v2h16v-2M12 15V5m0 0L8 9m4-4 4 4"/></svg>
      <b>Drop an image</b><span>or click, or paste one</span>
      <small>{{ formats }}, up to {{ Math.round(limit / 2 ** 20) }} MB</small>
    </label>`,
  mounted() {
    this.events = {
      dragover: (e) => { e.preventDefault(); this.over = true; },
      dragleave: (e) => { if (!e.relatedTarget) this.over = false; },
      drop: (e) => { e.preventDefault(); this.over = false; this.take(e.dataTransfer.files[0]); },
      paste: (e) => this.take([...e.clipboardData.files][0]),
    };
    for (const [name, handle] of Object.entries(this.events)) window.addEventListener(name, handle);
  },
  unmounted() {
    for (const [name, handle] of Object.entries(this.events)) window.removeEventListener(name, handle);
  },
  methods: {
    async take(file) {
      if (!file) return;
      if (file.size > this.limit) return this.$emit("failed", `The file is larger than ${Math.round(this.limit / 2 ** 20)} MB.`);
      this.$emit("sent");
      try {
        const response = await fetch(`/explain?network=${encodeURIComponent(this.network)}&tokens=${this.tokens}`, { method: "POST", body: file });
        const body = await response.json();
        response.ok ? this.$emit("explained", body.result) : this.$emit("failed", body.error);
      } catch {
        this.$emit("failed", "The server did not respond.");
      }
    },
  },
};
